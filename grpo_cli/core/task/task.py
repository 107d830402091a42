"""The interface of a task: problems by split, the prompt of each, the score of a completion.

Training, sampling and evaluation know a task by this interface alone; `countdown` is the task that ships. A model is
trained on `train`, the best one is chosen on `dev`, a fixed part of the train side, and `val` is only ever reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import combinations
from typing import Literal, Protocol, TypeVar

from grpo_cli.core.errors import CountdownError

P = TypeVar("P", bound="Problem")

Side = Literal["train", "val"]
Split = Literal["train", "dev", "val"]
Message = dict[str, str]  # role, content

DEV = 128  # problems that choose the best model


def divided(problems: Sequence[P]) -> tuple[list[P], list[P]]:
    """(train, dev) of the train side: dev has the tenth of the problems, at most DEV, whose keys hash lowest."""
    keys = {problem.key for problem in problems}
    count = min(DEV, max(len(keys) // 10, len(keys) > 1))
    dev = set(nsmallest(count, keys, key=lambda key: hashlib.sha256(key.encode()).digest()))
    return [one for one in problems if one.key not in dev], [one for one in problems if one.key in dev]


def require_apart(problems: Mapping[str, Sequence[Problem]]) -> None:
    """Raise CountdownError if a split is empty, or if problems of two splits are the same."""
    keys = {split: {problem.key for problem in own} for split, own in problems.items()}
    for split, own in keys.items():
        if not own:
            raise CountdownError(f"there are no {split} problems", "a training needs a train problem, and one for dev")
    for one, other in combinations(keys, 2):
        if shared := keys[one] & keys[other]:
            count = f"{len(shared):,} of {len(keys[other]):,} {other} problems are also {one} problems"
            raise CountdownError(f"{count}, first `{min(shared)}`", f"the {other} accuracy would be false: remove them")


@dataclass(frozen=True, slots=True)
class Score:
    """Reward of a completion, and the reason for it.

    `answer` is the text read as the answer. `well_formed`: the format is right. `lenient`: correct if typographic
    operators and a true `= N` are allowed (never a reward). `cheat`: the kind of cheat attempted, if any; it costs
    nothing. `parts`: the named parts of the reward, each logged as a metric.
    """

    reward: float
    correct: bool
    reason: str
    answer: str | None = None
    well_formed: bool = False
    lenient: bool = False
    cheat: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


class Problem(Protocol):
    """One problem of a task: hashable, and stated by plain JSON fields."""

    @property
    def key(self) -> str:
        """Equal for two notations of the same problem; duplicates and contamination are counted by it."""

    @property
    def size(self) -> int:
        """Size that the curriculum and suites choose by: the numbers in a puzzle; 0 if the task has no sizes."""

    def record(self) -> dict[str, object]:
        """JSON fields that state the problem, as samples.jsonl keeps them."""

    def __str__(self) -> str:
        """One line that states the problem to a person."""


class Task(Protocol):
    """A task. `problems` of the same split and size are always the same, in the same order."""

    @property
    def name(self) -> str: ...

    @property
    def styles(self) -> Sequence[str]:
        """Styles that a prompt can have, the default first."""

    @property
    def cheats(self) -> Sequence[str]:
        """Kinds of cheats that a score may name."""

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 of each file that defines the task, by the setting that names it."""

    def notes(self, sizes: Sequence[int]) -> list[str]:
        """Sentences for the user about the problems of these sizes."""

    def problems(self, split: Split, size: int) -> Sequence[Problem]:
        """Every problem of a split and size, or a fixed sample where there are too many."""

    def read(self, record: Mapping[str, object]) -> Problem:
        """The problem that a record states; ValueError says what is wrong with it."""

    def prompt(self, problem: Problem, style: str) -> list[Message]:
        """The chat messages that pose the problem."""

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        """Score of a completion; `truncated`: it ran out of tokens. Never raises on any text."""

    def solution(self, problem: Problem) -> str | None:
        """A completion that scores full, or None if the task knows none."""

    def kinds(self, problem: Problem) -> Sequence[str]:
        """Kinds that the problem belongs to; evaluations report accuracy by kind."""
