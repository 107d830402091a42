"""Callbacks of a training, and control over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from grpo_cli.core.run.folder import Run


class Interrupted(Exception):
    """A training was asked to stop; the last completed step is saved."""


@dataclass(frozen=True)
class Validated:
    """Accuracy after a step, on `count` val puzzles with its 95 % interval, and on dev; None where not evaluated.

    `sampled`: the mean accuracy of sampled completions, and the share of puzzles that any of them solves.
    """

    step: int
    accuracy: float
    count: int
    interval: tuple[float, float]
    suite_mean: float | None = None
    dev_accuracy: float | None = None
    sampled: tuple[float, float] | None = None


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

    def poll(self) -> None:
        """Raise Interrupted if the training is asked to stop."""
        if self.should_stop():
            raise Interrupted


def no_poll() -> None:
    """In place of `Control.poll`: nothing interrupts."""


class Observer:
    """Receives the events of a training and ignores them; override what you need."""

    def begin(self, run: Run, step: int) -> None:
        """The training of a run begins or resumes after `step`."""

    def message(self, text: str) -> None:
        """A sentence for the user."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Progress of a phase of the current step."""

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, Any]) -> None:
        """The metrics of a finished step and one of its completions, a record of samples.jsonl.

        Its `group` holds all completions of that prompt, as groups.jsonl.gz does.
        """

    def evaluated(self, result: Validated) -> None:
        """An evaluation, after its best model is saved and its log written."""


@dataclass(frozen=True)
class Observers(Observer):
    """Passes every event to several observers, in order."""

    observers: Sequence[Observer]

    def begin(self, run: Run, step: int) -> None:
        for observer in self.observers:
            observer.begin(run, step)

    def message(self, text: str) -> None:
        for observer in self.observers:
            observer.message(text)

    def progress(self, phase: str, done: int, total: int) -> None:
        for observer in self.observers:
            observer.progress(phase, done, total)

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.step(metrics, sample)

    def evaluated(self, result: Validated) -> None:
        for observer in self.observers:
            observer.evaluated(result)
