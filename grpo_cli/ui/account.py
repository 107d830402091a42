"""The data of a run's report: evaluations at its start, best and last step, and their differences.

Works on plain data, without files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from grpo_cli.core.evals.statistics import changes, mcnemar, significant, wilson
from grpo_cli.core.metrics import best_step
from grpo_cli.core.run.logs import Evaluated, Example
from grpo_cli.ui.figures import Curves
from grpo_cli.ui.text import probability

UNTESTED = "Solved puzzles were not recorded, so the difference cannot be tested."


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
    """The data of one run; a metrics file alone has only curves. `settings` are by key."""

    curves: Curves
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Mapping[str, Mapping[int, Evaluated]] = field(default_factory=dict)
    samples: Sequence[Example] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    summary: Mapping[str, object] | None = None
    environment: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.curves.name

    @cached_property
    def cells(self) -> Mapping[str, Mapping[int, Evaluated]]:
        """Every cell's evaluations by step; from the curves if none was recorded."""
        puzzles = (self.summary or {}).get("puzzles")
        count = puzzles if isinstance(puzzles, int) else 0
        series = self.curves.val | self.curves.cells
        drawn = {name: {step: _drawn(step, name, count, share) for step, share in series[name]} for name in series}
        return self.evaluations or {name: steps for name, steps in drawn.items() if steps}

    @property
    def own(self) -> Mapping[int, Evaluated]:
        """The evaluations by step of the cell that the run trains on."""
        return next(iter(self.cells.values()), {})  # validation evaluates it first

    @property
    def steps(self) -> int:
        """The last step taken."""
        taken = [int(line["step"]) for line in self.metrics]
        series = (self.curves.reward, self.curves.accuracy, self.curves.kl, *self.curves.val.values())
        return max([*taken, *(step for points in series for step, _ in points)], default=0)

    @property
    def best(self) -> int | None:
        """The step of the best model so far."""
        evaluated = [{"step": step, "val_accuracy": one.accuracy} for step, one in self.own.items()]
        chosen = ((self.summary or {}).get("best_step"), best_step(self.metrics), best_step(evaluated))
        return next((int(str(step)) for step in chosen if step and step in self.own), None)

    @property
    def chosen_on_dev(self) -> bool:
        """Whether dev puzzles, which are not the val puzzles, selected the best step."""
        return any("dev_accuracy" in line for line in self.metrics)

    @property
    def num_candidates(self) -> int:
        """Number of evaluations on these puzzles that the best was selected from; 1 if it was selected on dev."""
        return 1 if self.chosen_on_dev else len([step for step in self.own if step])

    def change(self, cell: str) -> Change | None:
        """The difference between a cell's evaluations at the start and the best step."""
        steps = self.cells[cell]
        return change(steps.get(0), steps.get(self.best)) if self.best else None

    def corrected(self, difference: Change) -> float:
        """The p-value of a change from the start to the best step, corrected for selecting on the same puzzles."""
        return min(1.0, difference.p_value * self.num_candidates)

    @property
    def milestones(self) -> list[tuple[str, int]]:
        """(label, step) of the evaluations to report: the start, the best and the last."""
        best, last = self.best, max((step for step in self.own if step), default=None)
        steps = {"start": 0 if 0 in self.own else None, "best": best, "last": last}
        if best == last:
            steps = {"start": steps["start"], "best and last": best}
        return [(word, step) for word, step in steps.items() if step in self.own and step is not None]


def verdict(account: Account) -> str:
    """One sentence; claims only differences that the exact test supports."""
    best = account.own.get(account.best or 0)
    if best is None or best.step == 0:
        return "Nothing has been evaluated after training yet."
    difference = change(account.own.get(0), best)
    if difference is None:
        return UNTESTED if 0 in account.own else "The starting model was not evaluated, so there is no comparison."
    p_value, count = account.corrected(difference), account.num_candidates
    chosen = f", corrected for choosing the best of {count} evaluations" if count > 1 else ""
    counts = f"{difference.gained:,} of {best.count:,} puzzles gained and {difference.lost:,} lost"
    test = f"{counts} (exact McNemar p {probability(p_value)}{chosen})"
    if not significant(p_value):
        return f"Not significant: {test}."
    return f"The model {'improved' if difference.gained > difference.lost else 'got worse'}: {test}."


def change(first: Evaluated | None, second: Evaluated | None) -> Change | None:
    """The difference between two evaluations; None unless both are known to use the same puzzles.

    None for dev cells too, which choose the best step: their difference is biased.
    """
    if not (first and second and first.solved and second.solved) or first.cell.startswith("dev "):
        return None
    if first.cell != second.cell or first.count != second.count or puzzles(first) != puzzles(second):
        return None
    if first.puzzles and second.puzzles and first.puzzles != second.puzzles:  # earlier versions wrote no hash
        return None
    return Change(*changes(first.solved, second.solved))


def puzzles(evaluation: Evaluated) -> list[tuple[list[int], int]]:
    """The puzzles of an evaluation's examples."""
    return [(example.numbers, example.target) for example in evaluation.examples]


def _drawn(step: int, cell: str, count: int, share: float) -> Evaluated:
    """One evaluation from a point of a curve; `count` is 0 if unknown."""
    interval = wilson(share, count) if count else None
    return Evaluated(step, cell, count, share, interval, None, None, None, reasons={}, solved="", examples=[])
