"""Callbacks of a training, and control over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Validated:
    """Accuracy after a step, on `count` val puzzles with its 95 % interval, and on dev; None where not evaluated."""

    step: int
    accuracy: float
    count: int
    interval: tuple[float, float]
    suite_mean: float | None = None
    dev_accuracy: float | None = None


class Control:
    """Stops a running training, or makes it save; by default neither. Override what you need.

    A warm start enters it as a context.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def should_stop(self) -> bool:
        """Whether to save the last completed step and raise Interrupted; polled between tokens and micro-batches."""
        return False

    def should_save(self) -> bool:
        """Whether to save a checkpoint now; polled after each step."""
        return False


class Observer:
    """Receives the events of a training and ignores them; override what you need."""

    def message(self, text: str) -> None:
        """A sentence for the user."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Progress of a phase of the current step."""

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None:
        """The metrics of a finished step and one of its completions, a record of samples.jsonl."""

    def evaluated(self, result: Validated) -> None:
        """An evaluation, after its best model is saved and its log written."""
