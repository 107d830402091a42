"""The data of a run's report: evaluations at its start, best and last step, and their differences.

Works on plain data, without files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_cli.core.evals.statistics import changes, mcnemar, significant
from grpo_cli.core.metrics import best_step
from grpo_cli.core.run.logs import Evaluated
from grpo_cli.ui.text import probability


@dataclass(frozen=True)
class Change:
    """Puzzles gained and lost between two evaluations."""

    gained: int
    lost: int

    @property
    def p_value(self) -> float:
        return mcnemar(self.gained, self.lost)


@dataclass(frozen=True)
class Account:
    """The data of one run. `settings` are by key, `evaluations` by cell and step."""

    name: str
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Mapping[str, Mapping[int, Evaluated]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)

    @property
    def own(self) -> Mapping[int, Evaluated]:
        """The evaluations by step of the cell that the run trains on."""
        return next(iter(self.evaluations.values()), {})  # validation evaluates it first

    @property
    def steps(self) -> int:
        """The last step taken."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def best(self) -> int:
        """The step of the best model so far; 0 before the first evaluation of a trained one."""
        return best_step(self.metrics)

    def change(self, cell: str) -> Change | None:
        """The difference between a cell's evaluations at the start and the best step."""
        steps = self.evaluations[cell]
        return change(steps.get(0), steps.get(self.best)) if self.best else None

    @property
    def milestones(self) -> list[tuple[str, int]]:
        """(label, step) of the evaluations to report: the start, the best and the last."""
        last = max(self.own, default=0)
        trained = [("best and last", last)] if self.best == last else [("best", self.best), ("last", last)]
        steps = [("start", 0), *(trained if self.best else [])]
        return [(word, step) for word, step in steps if step in self.own]


def verdict(account: Account) -> str:
    """One sentence; claims only differences that the exact test supports."""
    best = account.own.get(account.best)
    if best is None or best.step == 0:
        return "Nothing has been evaluated after training yet."
    difference = change(account.own.get(0), best)
    if difference is None:
        return "The starting model was not evaluated, so there is no comparison."
    counts = f"{difference.gained:,} of {best.count:,} puzzles gained and {difference.lost:,} lost"
    test = f"{counts} (exact McNemar p {probability(difference.p_value)})"
    if not significant(difference.p_value):
        return f"Not significant: {test}."
    return f"The model {'improved' if difference.gained > difference.lost else 'got worse'}: {test}."


def change(first: Evaluated | None, second: Evaluated | None) -> Change | None:
    """The difference between two evaluations; None if they are not of the same puzzles.

    None for dev cells too, which choose the best step: their difference is biased.
    """
    if first is None or second is None or first.cell.startswith("dev "):
        return None
    if (first.cell, first.count, first.puzzles) != (second.cell, second.count, second.puzzles):
        return None
    return Change(*changes(first.solved, second.solved))
