"""The logs of a run: format and validation of each line, and truncation to a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import Line, read_lines, write
from grpo_cli.core.task.countdown import recorded

LAST_STEP = 10**15
MOST_SECONDS = 1e12
Share = Annotated[float, Field(ge=0, le=1)]
Record = TypeVar("Record")


@dataclass(frozen=True)
class Example:
    """A completion of an evaluation, and its score."""

    completion: str
    reward: float | str
    reason: str
    answer: str | None = None
    numbers: list[int] = field(default_factory=list)  # of a countdown puzzle
    target: int = 0
    problem: str = ""  # of any other task

    @property
    def title(self) -> str:
        """The problem in one line."""
        return self.problem or f"{self.numbers} -> {self.target}"


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of one cell at one step; `Evaluation.record` explains the fields."""

    step: Annotated[int, Field(ge=0)]
    cell: str
    count: Annotated[int, Field(ge=0)]
    accuracy: Share
    interval: tuple[Share, Share]
    lenient_accuracy: Share
    format_rate: Share
    mean_length: Annotated[float, Field(ge=0)]
    reasons: dict[str, Annotated[int, Field(ge=0)]]
    solved: Annotated[str, Field(pattern="^[01]*$")]
    examples: list[Example]
    puzzles: str = ""  # hash of their keys, in order


@dataclass(frozen=True)
class Log(Generic[Record]):
    """A JSON Lines file whose lines all have a `step`; `parse` raises CountdownError for an invalid line."""

    path: Path
    parse: Callable[[Line], Record]

    def read(self) -> Iterator[Record]:
        """Every record in order; raises CountdownError naming a damaged line."""
        for line in read_lines(self.path):
            step_of(line)
            yield self.parse(line)

    def readable(self) -> Iterator[Record]:
        """Every record whose line is not damaged."""
        return (self.parse(line) for line in read_lines(self.path) if self._step(line) is not None)

    def damaged(self) -> int:
        """Number of unreadable lines."""
        return sum(self._step(line) is None for line in read_lines(self.path))

    def cut(self, last: int) -> int:
        """Keep the records up to step `last`, move damaged lines to `<log>.damaged`, and return their number."""
        return cut(self.path, [(self._step(line), line.raw) for line in read_lines(self.path)], last)

    def _step(self, line: Line) -> int | None:
        try:
            self.parse(line)
            return step_of(line)
        except CountdownError:
            return None


def cut(path: Path, pieces: Sequence[tuple[int | None, bytes]], last: int) -> int:
    """Rewrite a log of pieces, each with its step: keep those up to `last`, and move damaged ones (None) aside.

    Returns the number of damaged pieces.
    """
    damaged = [raw for step, raw in pieces if step is None]
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        write(aside, (aside.read_bytes() if aside.is_file() else b"") + b"".join(damaged))
    if path.exists():
        write(path, b"".join(raw for step, raw in pieces if step is not None and step <= last))
    return len(damaged)


def step_of(line: Line) -> int:
    """The step of a record; raises CountdownError if it has none."""
    step = line.record().get("step")
    if type(step) is not int or not 0 <= step <= LAST_STEP:
        raise CountdownError(f"{line.place} is not an object with a `step`")
    return step


def numbers(line: Line) -> dict[str, float]:
    """The metrics of a step: finite numbers, shares from 0 to 1 and plausible durations."""
    record: dict[str, float] = {}
    for name, value in line.record().items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CountdownError(f"`{name}` in {line.place} is not a number")
        low, high, words = _bounds(name)
        if not low <= value <= high:
            raise CountdownError(f"`{name}` in {line.place} is not {words}")
        record[name] = value
    return record


def _bounds(name: str) -> tuple[float, float, str]:
    if name.endswith("accuracy") or name.startswith("suite"):
        return 0.0, 1.0, "a share from 0 to 1"
    if name.startswith("time/"):
        return 0.0, MOST_SECONDS, "a number of seconds"
    return -sys.float_info.max, sys.float_info.max, "a finite number"


_EVALUATED = TypeAdapter(Evaluated)


def evaluated(line: Line) -> Evaluated:
    """The evaluation of a cell, with one character of `solved` per puzzle."""
    try:
        record = _EVALUATED.validate_python(line.record())
    except ValidationError as problem:
        first = problem.errors()[0]
        raise CountdownError(f"`{'.'.join(map(str, first['loc']))}` in {line.place}: {first['msg']}") from None
    if len(record.solved) != record.count:
        raise CountdownError(f"`solved` in {line.place} does not have a character for each of `count` puzzles")
    return record


def problem_key(line: Line) -> str:
    """The key of a sample's problem."""
    try:
        return recorded(line.record()).key
    except ValueError as problem:
        raise CountdownError(f"{line.place} {problem}") from None
