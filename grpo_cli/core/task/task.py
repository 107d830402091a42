"""The interface of a task: problems by split, the prompt of each, the score of a completion.

Training, sampling and evaluation use only this interface; `countdown` is the task that ships. A model is trained on
`train`; the best one is selected on `dev`, a fixed part of the train side; `val` is only reported.
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

DEV = 128  # problems that select the best model


def divided(problems: Sequence[P]) -> tuple[list[P], list[P]]:
    """(train, dev) of the train side: dev is the tenth of the problems, at most DEV, with the lowest key hashes."""
    keys = {problem.key for problem in problems}
    count = min(DEV, max(len(keys) // 10, len(keys) > 1))
    dev = set(nsmallest(count, keys, key=lambda key: hashlib.sha256(key.encode()).digest()))
    return [one for one in problems if one.key not in dev], [one for one in problems if one.key in dev]


def require_apart(problems: Mapping[str, Sequence[Problem]]) -> None:
    """Raise CountdownError if a split is empty, or if two splits share problems."""
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
    """Reward of a completion, and its reason.

    `answer`: the text read as the answer. `well_formed`: the format is right. `lenient`: correct if typographic
    operators and a true `= N` are allowed (never a reward). `cheat`: the kind of cheating, if any; not penalised.
    `parts`: named parts of the reward, `behaviour`: how the completion searches; each is logged as a metric.
    """

    reward: float
    correct: bool
    reason: str
    answer: str | None = None
    well_formed: bool = False
    lenient: bool = False
    cheat: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    behaviour: Mapping[str, float] = field(default_factory=dict)


class Problem(Protocol):
    """One problem of a task: hashable, and described by plain JSON fields."""

    @property
    def key(self) -> str:
        """Equal for two notations of the same problem; used for duplicates and contamination."""

    @property
    def size(self) -> int:
        """Size for the curriculum and suites: the numbers in a puzzle; 0 if the task has no sizes."""

    def record(self) -> dict[str, object]:
        """JSON fields that describe the problem, as in samples.jsonl."""

    def __str__(self) -> str:
        """The problem in one line for users."""


class Task(Protocol):
    """A task. `problems` returns the same list in the same order for the same split and size."""

    @property
    def name(self) -> str: ...

    @property
    def styles(self) -> Sequence[str]:
        """Prompt styles, the default first."""

    @property
    def cheats(self) -> Sequence[str]:
        """Kinds of cheating that a score may name."""

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 of each file that defines the task, by the setting that names it."""

    def notes(self, sizes: Sequence[int]) -> list[str]:
        """Sentences for the user about the problems of these sizes."""

    def problems(self, split: Split, size: int) -> Sequence[Problem]:
        """All problems of a split and size, or a fixed sample if there are too many."""

    def read(self, record: Mapping[str, object]) -> Problem:
        """The problem of a record; raises ValueError with the problem found."""

    def prompt(self, problem: Problem, style: str) -> list[Message]:
        """The chat messages of the problem."""

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        """Score of a completion; `truncated`: it reached the token limit. Never raises for any text."""

    def solution(self, problem: Problem) -> str | None:
        """A completion with full score, or None if unknown."""
