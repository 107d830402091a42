"""Contamination: which evaluation puzzles a model was trained on, as far as known.

A run records every problem that it trained on; the built-in model's recipe defines which puzzles it may have imitated;
nothing is known about other models. The order of a puzzle's numbers does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from grpo_cli.core.builtin.recipe import may_imitate
from grpo_cli.core.model.load import load
from grpo_cli.core.run.folder import Run, find_run, run_of
from grpo_cli.core.task.task import Problem

RECIPE = "all train puzzles of 3 and 4 numbers by the recipe of builtin"


@dataclass(frozen=True)
class Known:
    """Keys of problems that a model was trained on, by run, and whether the built-in recipe's count too."""

    runs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    recipe: bool = False  # it started from the built-in model
    unknown: str | None = None  # name of its starting model, if nothing is known about that
    damaged: int = 0  # unreadable lines of the runs' samples

    def __contains__(self, problem: Problem) -> bool:
        return (self.recipe and may_imitate(problem)) or any(problem.key in seen for seen in self.runs.values())

    def statement(self, problems: Sequence[Problem]) -> str:
        """A sentence on how many of `problems` were trained on, and how that is known."""
        count = overlap(problems, self)
        if count is None:
            return f"what {self.unknown} was trained on is not known"
        parts = [f"the {len(seen):,} of {name}" for name, seen in self.runs.items()]
        parts += [RECIPE] if self.recipe else []
        rest = f"; what {self.unknown} was trained on is not known" if self.unknown else ""
        rest += f"; {self.damaged} damaged line{'s' * (self.damaged > 1)} of samples left out" if self.damaged else ""
        noun = "puzzles" if all(problem.size for problem in problems) else "problems"
        return f"{count:,} of {len(problems):,} {noun} were trained on (compared with {' and '.join(parts)}{rest})"


def overlap(problems: Iterable[Problem], known: Known) -> int | None:
    """How many problems are known to have been trained on; None if nothing is known."""
    return sum(problem in known for problem in problems) if known.runs or known.recipe else None


def known(model: str, root: Path) -> Known:
    """Problems that a model was trained on: a run of `root` by name, a run's model folder, or `builtin`.

    Includes the problems of its starting model. Raises CountdownError if a run's settings cannot be read; damaged lines
    of samples are counted.
    """
    return _known(model, root, frozenset())


def _known(model: str, root: Path, later: frozenset[Path]) -> Known:
    """As `known`, without the runs in `later`: a run may have the name of its own starting model."""
    runs = [find_run(root, model), run_of(Path(model))]
    run = next((candidate for candidate in runs if candidate and candidate.path.resolve() not in later), None)
    if run is None:
        return Known(recipe=True) if model == "builtin" else Known(unknown=model)
    settings = run.settings.model
    before = _known(settings.model, run.path.parent, later | {run.path.resolve()})
    if settings.model == "builtin" and not _is_shipped(run):
        before = Known(unknown="a model called builtin, with other weights,")
    seen, damaged = frozenset(run.trained_on()), before.damaged + run.damaged_samples()
    if not seen:
        return Known(unknown=run.name, damaged=damaged)
    return replace(before, runs={run.name: seen, **before.runs}, damaged=damaged)


def _is_shipped(run: Run) -> bool:
    """Whether a run of the built-in model started from the shipped weights, as far as recorded."""
    if not run.has_origin:
        return True
    shipped = (load("builtin", device="cpu", precision=precision) for precision in ("float32", "bf16"))
    return run.read_origin().get("weights") in [policy.fingerprint()["weights"] for policy in shipped]
