"""Countdown as a task: puzzles, prompts and scores behind the interface of `task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from grpo_cli.core.task.data import puzzle_set
from grpo_cli.core.task.prompts import STYLES, Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import CHEATS, ORIGINAL_REWARDS, Rewards, score
from grpo_cli.core.task.solver import needs_parentheses, solve
from grpo_cli.core.task.task import Message, Problem, Score, Split, Task

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings


def task_of(settings: Settings) -> Task:
    """The task that the settings choose."""
    return Countdown(settings.reward.weights)


@dataclass(frozen=True)
class Countdown:
    """Make a target from numbers."""

    rewards: Rewards = ORIGINAL_REWARDS
    name: str = "countdown"
    styles: Sequence[str] = STYLES
    cheats: Sequence[str] = CHEATS

    def problems(self, split: Split, size: int) -> list[Puzzle]:
        return puzzle_set(size, split)

    def read(self, record: Mapping[str, object]) -> Puzzle:
        numbers, target = record.get("numbers"), record.get("target")
        if not isinstance(numbers, list) or any(type(number) is not int for number in (*numbers, target)):
            raise ValueError("has no puzzle in `numbers` and `target`")
        return Puzzle(tuple(numbers), cast(int, target))

    def prompt(self, problem: Problem, style: str) -> list[Message]:
        return prompt(_puzzle(problem), cast(Style, style))

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        return score(completion, _puzzle(problem), style=cast(Style, style), truncated=truncated, rewards=self.rewards)

    def solution(self, problem: Problem) -> str | None:
        """A completion with the shortest solution, if there is one."""
        solutions = solve(_puzzle(problem))
        return f"<think>\n{solutions[0]}\n</think>\n<answer>{solutions[0]}</answer>" if solutions else None

    def kinds(self, problem: Problem) -> tuple[str, str]:
        puzzle = _puzzle(problem)
        parentheses = "needs parentheses" if needs_parentheses(puzzle) else "no parentheses needed"
        return parentheses, "one solution" if len(solve(puzzle)) == 1 else "several solutions"


def _puzzle(problem: Problem) -> Puzzle:
    assert isinstance(problem, Puzzle)
    return problem
