"""Countdown as a task: puzzles, prompts and scores, implementing the interface in `task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from grpo_cli.core.metrics import CHEATS
from grpo_cli.core.task.behaviour import observe
from grpo_cli.core.task.data import puzzle_set, sampling_note
from grpo_cli.core.task.files import PuzzleFile, load_puzzles
from grpo_cli.core.task.plugin import Item, load_task, rewarded
from grpo_cli.core.task.prompts import STYLES, Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import ORIGINAL, Rules
from grpo_cli.core.task.scoring import ORIGINAL_REWARDS, Rewards, score
from grpo_cli.core.task.solver import solution
from grpo_cli.core.task.task import Message, Problem, Score, Split, Task, divided

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings


def task_of(settings: Settings) -> Task:
    """The task of the settings."""
    task, reward = settings.task, settings.reward
    chosen: Task
    if task.task == "countdown":
        paths = (None if name == "none" else Path(name) for name in (task.puzzles, task.dev_puzzles, task.val_puzzles))
        chosen = Countdown(task.rules, reward.weights, PuzzlePaths(*paths))
    else:
        chosen = load_task(task.task, reward.reward_errors)
    return chosen if reward.reward == "none" else rewarded(chosen, reward.reward, reward.reward_errors)


@dataclass(frozen=True)
class PuzzlePaths:
    """Puzzle files: one that replaces the generated puzzles, and files that are all dev or all val."""

    puzzles: Path | None = None
    dev: Path | None = None
    val: Path | None = None


@dataclass(frozen=True)
class Countdown:
    """Make a target from numbers, by these rules."""

    rules: Rules = ORIGINAL
    rewards: Rewards = ORIGINAL_REWARDS
    paths: PuzzlePaths = PuzzlePaths()
    name: str = "countdown"
    styles: Sequence[str] = STYLES
    cheats: Sequence[str] = tuple(CHEATS)

    @property
    def files(self) -> dict[str, str]:
        return {name: file.sha256 for name, file in self._loaded.items()}

    def notes(self, sizes: Sequence[int]) -> list[str]:
        """The counts of the puzzle files, or the sizes whose splits are sampled."""
        sampled = [] if self.paths.puzzles else [note for size in sizes if (note := sampling_note(size, self.rules))]
        return [*sampled, *map(str, self._loaded.values())]

    @property
    def _loaded(self) -> dict[str, PuzzleFile]:
        """The puzzle files by the setting that names them."""
        paths, loaded = self.paths, {}
        if paths.puzzles:
            loaded["puzzles"] = load_puzzles(paths.puzzles, self.rules, unmarked="train" if paths.val else None)
        if paths.dev:
            loaded["dev_puzzles"] = load_puzzles(paths.dev, self.rules, every="dev")
        if paths.val:
            loaded["val_puzzles"] = load_puzzles(paths.val, self.rules, every="val")
        return loaded

    def problems(self, split: Split, size: int) -> list[Puzzle]:
        loaded = self._loaded
        if own := loaded.get(f"{split}_puzzles"):
            return own.puzzles(split)
        main = loaded.get("puzzles")
        if split == "train" and "dev_puzzles" in loaded:
            dev = {puzzle.key for puzzle in loaded["dev_puzzles"].puzzles("dev")}
            side = main.rows["train"] if main else puzzle_set(size, "train", self.rules)
            return [puzzle for puzzle in side if puzzle.key not in dev]
        if main:
            return main.puzzles(split)
        return puzzle_set(size, "val", self.rules) if split == "val" else list(_generated(split, size, self.rules))

    def read(self, record: Mapping[str, object]) -> Puzzle:
        numbers, target = record.get("numbers"), record.get("target")
        if not isinstance(numbers, list) or any(type(number) is not int for number in (*numbers, target)):
            raise ValueError("has no puzzle in `numbers` and `target`")
        return Puzzle(tuple(numbers), cast(int, target))

    def prompt(self, problem: Problem, style: str) -> list[Message]:
        return prompt(_puzzle(problem), cast(Style, style), self.rules)

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        puzzle, style = _puzzle(problem), cast(Style, style)
        found = score(completion, puzzle, style=style, truncated=truncated, rules=self.rules, rewards=self.rewards)
        seen = observe(completion, puzzle, self.rules, answer=found.answer, correct=found.correct, truncated=truncated)
        return replace(found, behaviour=seen)

    def solution(self, problem: Problem) -> str | None:
        """A completion with the shortest solution, if there is one."""
        solved = solution(_puzzle(problem), self.rules)
        return f"<think>\n{solved}\n</think>\n<answer>{solved}</answer>" if solved else None


def recorded(record: Mapping[str, object]) -> Problem:
    """The problem of a logged record, of a task file or of countdown; raises ValueError with the problem found."""
    problem = record.get("problem")
    return Item(problem) if isinstance(problem, str) else Countdown().read(record)


@cache
def _generated(split: Split, size: int, rules: Rules) -> list[Puzzle]:
    """The generated train or dev puzzles."""
    train, dev = divided(puzzle_set(size, "train", rules))
    return dev if split == "dev" else train


def _puzzle(problem: Problem) -> Puzzle:
    assert isinstance(problem, Puzzle)
    return problem
