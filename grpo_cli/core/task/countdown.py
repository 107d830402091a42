"""Countdown as a task: puzzles, prompts and scores behind the interface of `task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from grpo_cli.core.metrics import CHEATS
from grpo_cli.core.task.data import puzzle_set, sampling_note
from grpo_cli.core.task.files import load_puzzles
from grpo_cli.core.task.plugin import load_task, rewarded
from grpo_cli.core.task.prompts import STYLES, Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import ORIGINAL, Rules
from grpo_cli.core.task.scoring import ORIGINAL_REWARDS, Rewards, score
from grpo_cli.core.task.solver import needs_parentheses, solution, solve
from grpo_cli.core.task.task import Message, Problem, Score, Split, Task

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings


def task_of(settings: Settings) -> Task:
    """The task that the settings choose."""
    task, reward = settings.task, settings.reward
    chosen: Task
    if task.task == "countdown":
        chosen = Countdown(task.rules, reward.weights, None if task.puzzles == "none" else Path(task.puzzles))
    else:
        chosen = load_task(task.task)
    return chosen if reward.reward == "none" else rewarded(chosen, reward.reward, reward.reward_errors)


@dataclass(frozen=True)
class Countdown:
    """Make a target from numbers, by these rules."""

    rules: Rules = ORIGINAL
    rewards: Rewards = ORIGINAL_REWARDS
    path: Path | None = None  # of a puzzle file that replaces the puzzles of the rules
    name: str = "countdown"
    styles: Sequence[str] = STYLES
    cheats: Sequence[str] = tuple(CHEATS)

    @property
    def files(self) -> dict[str, str]:
        return {"puzzles": load_puzzles(self.path, self.rules).sha256} if self.path else {}

    def notes(self, sizes: Sequence[int]) -> list[str]:
        """The counts of the puzzle file, or the sizes that are sampled."""
        if self.path:
            return [str(load_puzzles(self.path, self.rules))]
        return [note for size in sizes if (note := sampling_note(size, self.rules))]

    def problems(self, split: Split, size: int) -> list[Puzzle]:
        return load_puzzles(self.path, self.rules).puzzles(split) if self.path else puzzle_set(size, split, self.rules)

    def read(self, record: Mapping[str, object]) -> Puzzle:
        numbers, target = record.get("numbers"), record.get("target")
        if not isinstance(numbers, list) or any(type(number) is not int for number in (*numbers, target)):
            raise ValueError("has no puzzle in `numbers` and `target`")
        return Puzzle(tuple(numbers), cast(int, target))

    def prompt(self, problem: Problem, style: str) -> list[Message]:
        return prompt(_puzzle(problem), cast(Style, style), self.rules)

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        puzzle, style = _puzzle(problem), cast(Style, style)
        return score(completion, puzzle, style=style, truncated=truncated, rules=self.rules, rewards=self.rewards)

    def solution(self, problem: Problem) -> str | None:
        """A completion with the shortest solution, if there is one."""
        solved = solution(_puzzle(problem), self.rules)
        return f"<think>\n{solved}\n</think>\n<answer>{solved}</answer>" if solved else None

    def kinds(self, problem: Problem) -> tuple[str, str]:
        puzzle = _puzzle(problem)
        parentheses = "needs parentheses" if needs_parentheses(puzzle, self.rules) else "no parentheses needed"
        return parentheses, "one solution" if len(solve(puzzle, self.rules)) == 1 else "several solutions"


def _puzzle(problem: Problem) -> Puzzle:
    assert isinstance(problem, Puzzle)
    return problem
