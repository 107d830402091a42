"""Paired comparison of two models on the same puzzles."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_cli.core.evals.evaluate import Completion, Evaluation, SuiteResult
from grpo_cli.core.evals.statistics import holm, mcnemar


@dataclass(frozen=True)
class SuitePaired:
    """Two models compared on a suite, cell by cell."""

    first: str
    second: str
    cells: dict[str, Paired]

    @property
    def p_holm(self) -> dict[str, float]:
        """p-value of each cell, Holm-corrected for the number of cells."""
        return dict(zip(self.cells, holm([pair.p_value for pair in self.cells.values()]), strict=True))

    def to_json(self) -> list[dict[str, object]]:
        """The machine-readable result."""
        corrected = self.p_holm
        return [{"cell": cell, **fields.to_json(), "p_holm": corrected[cell]} for cell, fields in self.cells.items()]


@dataclass(frozen=True)
class Paired:
    """Two models on the same puzzles, one completion each: the pairs (first, second) of which only one is correct."""

    first: str
    second: str
    gained: list[tuple[Completion, Completion]]  # correct only in the second
    lost: list[tuple[Completion, Completion]]

    @property
    def p_value(self) -> float:
        """p-value of the exact McNemar test."""
        return mcnemar(len(self.gained), len(self.lost))

    def to_json(self) -> dict[str, object]:
        """The machine-readable result."""
        fields = {"first": self.first, "second": self.second, "gained": len(self.gained), "lost": len(self.lost)}
        return {**fields, "p_value": self.p_value}


def paired(first: Evaluation, second: Evaluation) -> Paired | None:
    """Puzzles gained and lost by the second model; None unless both have one completion of each of the same puzzles."""
    if first.samples > 1 or second.samples > 1:
        return None
    pairs = list(zip(first._all, second._all, strict=False))
    if len(first._all) != len(second._all) or any(one.puzzle != other.puzzle for one, other in pairs):
        return None
    gained = [pair for pair in pairs if pair[1].score.correct and not pair[0].score.correct]
    lost = [pair for pair in pairs if pair[0].score.correct and not pair[1].score.correct]
    return Paired(first.model, second.model, gained, lost)


def suite_paired(first: SuiteResult, second: SuiteResult) -> SuitePaired | None:
    """Puzzles gained and lost in each cell; None if `paired` is None for one."""
    pairs = {one.cell: pair for one, two in zip(first.cells, second.cells, strict=True) if (pair := paired(one, two))}
    return SuitePaired(first.model, second.model, pairs) if len(pairs) == len(first.cells) else None
