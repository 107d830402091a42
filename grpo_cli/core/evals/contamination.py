"""Leaks: which puzzles a model was trained on, as far as that is known, and which of them an evaluation asks again.

A run keeps every prompt that it trained on, and the built-in model's recipe says what it imitated; of other models
nothing is known. A puzzle is the same whatever the order of its numbers. Knows neither weights nor prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from grpo_cli.core.builtin.recipe import may_imitate
from grpo_cli.core.config.resolve import restore
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.run.folder import list_runs, run_of
from grpo_cli.core.task.puzzle import Puzzle

RECIPE = "all train puzzles of 3 and 4 numbers by the recipe of builtin"

Key = tuple[tuple[int, ...], int]  # sorted numbers, target


@dataclass(frozen=True)
class Known:
    """What a model was trained on: the puzzles of each run that led to it, the recipe's, or what cannot be known."""

    runs: Mapping[str, frozenset[Key]] = field(default_factory=dict)
    recipe: bool = False  # it began as the built-in model
    unknown: str | None = None  # the model that it began as, of which nothing is known

    def __contains__(self, puzzle: Puzzle) -> bool:
        key = _key(puzzle.numbers, puzzle.target)
        return any(key in seen for seen in self.runs.values()) or (self.recipe and may_imitate(puzzle))

    def statement(self, puzzles: Sequence[Puzzle]) -> str:
        """How many of `puzzles` it was trained on, and how that is known."""
        count = overlap(puzzles, self)
        if count is None:
            return f"what {self.unknown} was trained on is not known"
        parts = [f"{len(seen):,} known from {name}" for name, seen in self.runs.items()]
        parts += [RECIPE] if self.recipe else []
        rest = f"; what {self.unknown} was trained on is not known" if self.unknown else ""
        return f"{count:,} of {len(puzzles):,} puzzles were trained on ({', and '.join(parts)}{rest})"


def overlap(puzzles: Iterable[Puzzle], known: Known) -> int | None:
    """How many of `puzzles` are known to have been trained on; None if nothing is known."""
    if not known.runs and not known.recipe:
        return None
    return sum(puzzle in known for puzzle in puzzles)


def known(model: str, root: Path) -> Known:
    """What a model was trained on: a run of `root` by name, a run's model folder, or `builtin`.

    With a run goes all that its starting model was trained on. Raises CountdownError where a run's settings or samples
    cannot be read.
    """
    return _known(model, root, frozenset())


def _known(model: str, root: Path, later: frozenset[Path]) -> Known:
    """`later` are the folders of the runs that it led to: a run that bears its own starting model's name is not it."""
    runs = [*(run for run in list_runs(root) if run.name == model), run_of(Path(model))]
    run = next((found for found in runs if found and found.path.resolve() not in later), None)
    if run is None:
        return Known(recipe=True) if model == "builtin" else Known(unknown=model)
    start = restore(run.read_config(), run.config_path).settings.model.model
    before = _known(start, run.path.parent, later | {run.path.resolve()})
    try:
        seen = frozenset(_key(numbers, target) for numbers, target in run.prompts())
    except CountdownError as problem:
        hint = "mend the line, or remove the file: what the run was trained on is then not known"
        raise CountdownError(problem.message, hint) from None
    return replace(before, runs={run.name: seen, **before.runs}) if seen else Known(unknown=run.name)


def _key(numbers: Iterable[int], target: int) -> Key:
    return tuple(sorted(numbers)), target
