"""What there is to tell of a run: what was solved at its start, its best and its last step, and what has changed.

It is handed plain data, checks what came from a file, and knows neither where that stands nor how it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.statistics import mcnemar, wilson
from grpo_cli.plot import Curves

Record = TypeVar("Record")


@dataclass(frozen=True)
class Example:
    """A completion and its score."""

    numbers: list[int]
    target: int
    completion: str
    reward: float | str
    reason: str
    answer: str | None = None
    step: int = 0


@dataclass(frozen=True)
class Evaluated:
    """One cell of puzzles after one step. `count` is 0 where it is not known, `solved` one `0` or `1` a puzzle."""

    step: Annotated[int, Field(ge=0)]
    cell: str
    count: Annotated[int, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    lenient_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    format_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    mean_length: Annotated[float, Field(ge=0)] | None = None
    reasons: dict[str, Annotated[int, Field(ge=0)]] = field(default_factory=dict)
    solved: Annotated[str, Field(pattern="^[01]*$")] = ""
    examples: list[Example] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.solved and len(self.solved) != self.count:
            raise ValueError("there is not one `solved` for each puzzle")

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.accuracy, self.count) if self.count else None

    @property
    def puzzles(self) -> list[tuple[list[int], int]]:
        """Those of the examples."""
        return [(example.numbers, example.target) for example in self.examples]


@dataclass(frozen=True)
class Change:
    """What a second evaluation solves that a first does not, and the reverse."""

    gained: int
    lost: int

    @property
    def p_value(self) -> float:
        return mcnemar(self.gained, self.lost)


@dataclass(frozen=True)
class Account:
    """What there is to tell of one run; of a file of metrics there are curves alone. `settings` are by key."""

    curves: Curves
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Sequence[Evaluated] = ()
    samples: Sequence[Example] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    summary: Mapping[str, object] | None = None
    environment: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.curves.name

    @cached_property
    def cells(self) -> dict[str, dict[int, Evaluated]]:
        """Every cell's evaluations by step; from the curves alone where none was recorded."""
        puzzles = (self.summary or {}).get("puzzles")
        count = puzzles if isinstance(puzzles, int) else 0
        drawn = (
            Evaluated(step, name, count, share) for name, points in self.curves.val.items() for step, share in points
        )
        cells: dict[str, dict[int, Evaluated]] = {}
        for found in self.evaluations or drawn:
            cells.setdefault(found.cell, {})[found.step] = found
        return cells

    @property
    def own(self) -> dict[int, Evaluated]:
        """The evaluations, by step, of the cell that the run trains for."""
        name = f"val {self.settings.get('task.numbers')} {self.settings.get('task.style')}"
        return self.cells.get(name) or next(iter(self.cells.values()), {})

    @property
    def steps(self) -> int:
        """The last step taken."""
        taken = [int(line["step"]) for line in self.metrics]
        series = (self.curves.reward, self.curves.accuracy, self.curves.kl, *self.curves.val.values())
        return max([*taken, *(step for points in series for step, _ in points)], default=0)

    @property
    def best(self) -> int | None:
        """The step whose model was kept, or so far has done best."""
        chosen = (self.summary or {}).get("best_step")
        if chosen in self.own:
            return int(str(chosen))
        means = {int(line["step"]): line["suite_mean"] for line in self.metrics if "suite_mean" in line}
        shares = means or {step: found.accuracy for step, found in self.own.items()}
        return max((step for step in shares if step), key=shares.__getitem__, default=None)

    @property
    def looks(self) -> int:
        """Evaluations that the best was chosen from."""
        return len([step for step in self.own if step])

    def corrected(self, found: Change) -> float:
        """The p value of a change from the start to the best step, given that it was chosen on the same puzzles."""
        return min(1.0, found.p_value * self.looks)

    @property
    def stations(self) -> list[tuple[str, int]]:
        """(what it is, step) of the evaluations worth telling: the start, the best and the last."""
        last = max((step for step in self.own if step), default=None)
        best = "best and last" if self.best == last else "best"
        found = [("start", 0 if 0 in self.own else None), (best, self.best), ("last", last)]
        kept = [(word, step) for word, step in found if step is not None]
        return kept[:-1] if best != "best" and last is not None else kept


def read_evaluations(lines: Iterable[tuple[str, Mapping[str, object]]]) -> list[Evaluated]:
    """(where it stands, what it holds) of each evaluation, checked; CountdownError names the place of a damaged one."""
    kind = TypeAdapter(Evaluated)
    return [_checked(kind, place, record) for place, record in lines]


def read_samples(lines: Iterable[tuple[str, Mapping[str, object]]], *, most: int = 2) -> list[Example]:
    """The first `most` completions of the first and of the last step among the lines, checked likewise."""
    rows = list(lines)
    steps = [record["step"] for _, record in rows]
    ends = dict.fromkeys((steps[0], steps[-1])) if steps else {}
    chosen = [row for end in ends for row in [row for row in rows if row[1]["step"] == end][:most]]
    kind = TypeAdapter(Example)
    return [_checked(kind, place, record) for place, record in chosen]


def _checked(kind: TypeAdapter[Record], place: str, record: Mapping[str, object]) -> Record:
    try:
        return kind.validate_python(record)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise CountdownError(f"{place} is damaged: " + (f"`{where}`: {message}" if where else message)) from None


def change(first: Evaluated | None, second: Evaluated | None) -> Change | None:
    """What changed from one evaluation to another, or None unless both are known to be of the same puzzles."""
    if not (first and second and first.solved and second.solved):
        return None
    if first.cell != second.cell or first.count != second.count or first.puzzles != second.puzzles:
        return None
    pairs = list(zip(first.solved, second.solved, strict=True))
    return Change(gained=pairs.count(("0", "1")), lost=pairs.count(("1", "0")))
