"""The logs of a run: format and validation of each line, and truncation to a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import json_object, read_lines, write
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
    """A JSON Lines file whose lines all have a `step`; `parse` raises ValueError for an invalid record."""

    path: Path
    parse: Callable[[dict[str, object]], Record]

    def read(self) -> Iterator[Record]:
        """Every record in order; raises CountdownError naming a damaged line."""
        for _, parsed in self._lines():
            if isinstance(parsed, CountdownError):
                raise parsed
            yield parsed[1]

    def readable(self) -> Iterator[Record]:
        """Every record whose line is not damaged."""
        return (parsed[1] for _, parsed in self._lines() if not isinstance(parsed, CountdownError))

    def damaged(self) -> int:
        """Number of unreadable lines."""
        return sum(isinstance(parsed, CountdownError) for _, parsed in self._lines())

    def cut(self, last: int) -> int:
        """Keep the records up to step `last`, move damaged lines to `<log>.damaged`, and return their number."""
        steps = [(None if isinstance(parsed, CountdownError) else parsed[0], raw) for raw, parsed in self._lines()]
        return cut(self.path, steps, last)

    def _lines(self) -> Iterator[tuple[bytes, tuple[int, Record] | CountdownError]]:
        """Every line with its step and record, or with what is wrong with it."""
        for number, raw in read_lines(self.path):
            parsed: tuple[int, Record] | CountdownError
            try:
                record = json_object(raw)
                parsed = _step(record), self.parse(record)
            except ValueError as problem:
                parsed = CountdownError(f"line {number} of `{self.path}` {problem}")
            yield raw, parsed


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


def _step(record: Mapping[str, object]) -> int:
    step = record.get("step")
    if type(step) is not int or not 0 <= step <= LAST_STEP:
        raise ValueError("is not an object with a `step`")
    return step


def numbers(record: Mapping[str, object]) -> dict[str, float]:
    """The metrics of a step: finite numbers, shares from 0 to 1 and plausible durations."""
    metrics: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"has a `{name}` that is not a number")
        low, high, words = _bounds(name)
        if not low <= value <= high:
            raise ValueError(f"has a `{name}` that is not {words}")
        metrics[name] = value
    return metrics


def _bounds(name: str) -> tuple[float, float, str]:
    if name.endswith("accuracy") or name.startswith("suite"):
        return 0.0, 1.0, "a share from 0 to 1"
    if name.startswith("time/"):
        return 0.0, MOST_SECONDS, "a number of seconds"
    return -sys.float_info.max, sys.float_info.max, "a finite number"


_EVALUATED = TypeAdapter(Evaluated)


def evaluated(record: Mapping[str, object]) -> Evaluated:
    """The evaluation of a cell, with one character of `solved` per puzzle."""
    try:
        evaluation = _EVALUATED.validate_python(record)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ValueError(f"has a wrong `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
    if len(evaluation.solved) != evaluation.count:
        raise ValueError("has a `solved` without a character for each of `count` puzzles")
    return evaluation


def problem_key(record: Mapping[str, object]) -> str:
    """The key of a sample's problem."""
    return recorded(record).key
