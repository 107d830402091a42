"""Learning rate and prompts of each step of a training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

from grpo_cli.core.config.settings import Settings, Train
from grpo_cli.core.task.countdown import task_of
from grpo_cli.core.task.curriculum import Curriculum, schedule
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.suite import SIZES
from grpo_cli.core.task.task import Problem, Task, require_apart

PLANNED_STEPS = 4  # memory is planned for the prompts of about so many steps
PLANNED_PROMPTS = 1000


def scheduled_rate(train: Train, step: int) -> float:
    """Learning rate of a step, from 1: linear warm-up to its peak, then constant or falling to 0 at the end."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    done = (step - 1 - train.warmup_steps) / max(1, train.num_iterations - train.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return train.learning_rate * shapes[train.schedule]


@dataclass(frozen=True)
class Problems:
    """The task of a training, the prompts of its steps, and its problems by split."""

    task: Task
    curriculum: Curriculum
    splits: Mapping[str, Sequence[Problem]]

    @classmethod
    def of(cls, settings: Settings, task: Task | None = None) -> Problems:
        """The problems of the settings; `task`: the task, if it is loaded already.

        Raises CountdownError if a split is empty or shares problems with another.
        """
        task, size = task or task_of(settings), settings.task.numbers
        prompts = _curriculum(settings, task)
        splits = {"train": list(chain.from_iterable(prompts.problems.values()))}
        splits |= {"dev": list(task.problems("dev", size)), "val": list(task.problems("val", size))}
        require_apart(splits)
        return cls(task, prompts, splits)

    def notes(self) -> list[str]:
        """Sentences for the user about the problems."""
        return self.task.notes(list(self.curriculum.problems))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the problems of each split, and of each file that defines the task."""
        listed = {split: "\n".join(map(_stated, problems)) for split, problems in self.splits.items()}
        hashes = {f"{split} problems": hashlib.sha256(text.encode()).hexdigest() for split, text in listed.items()}
        return hashes | {f"{name} file": sha for name, sha in self.task.files.items()}


def _stated(problem: Problem) -> str:
    """The values of its record, lists as tuples: `(3, 5, 2) 13`."""
    return " ".join(str(tuple(value) if isinstance(value, list) else value) for value in problem.record().values())


def _curriculum(settings: Settings, task: Task) -> Curriculum:
    asked, train = settings.task, settings.train
    sizes = str(asked.numbers) if train.prompt_numbers == "task" else train.prompt_numbers
    styles = asked.style if train.prompt_style == "task" else train.prompt_style
    numbers, style = schedule(sizes, [str(size) for size in SIZES]), schedule(styles, STYLES)
    problems = {size: task.problems("train", size) for size in map(int, numbers.choices)}
    return Curriculum(problems, numbers, style, train.batch_size, train.seed)


def longest_prompt(
    settings: Settings, problems: Problems, encode: Callable[[Sequence[dict[str, str]]], list[int]]
) -> int:
    """Tokens of the longest prompt of some steps over the whole schedule, of at most PLANNED_PROMPTS."""
    task, prompts = problems.task, problems.curriculum
    count = settings.train.num_iterations
    steps = range(1, count + 1, max(1, count // PLANNED_STEPS))
    drawn = (item for step in steps for item in prompts.prompts(step))
    return max(len(encode(task.prompt(problem, style))) for problem, style in islice(drawn, PLANNED_PROMPTS))
