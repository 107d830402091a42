"""Learning rate and prompts of each step of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, islice

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.task.countdown import task_of
from grpo_cli.core.task.curriculum import Curriculum, schedule
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.suite import SIZES
from grpo_cli.core.task.task import Problem, require_apart

PLANNED_STEPS = 4  # memory is planned for the prompts of about so many steps
PLANNED_PROMPTS = 1000


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup_steps: int, num_iterations: int) -> float:
    """Learning rate of a step, from 1: linear warm-up to `peak`, then constant or falling to 0 at the end."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - 1 - warmup_steps) / max(1, num_iterations - warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return peak * shapes[schedule]


def curriculum(settings: Settings) -> Curriculum:
    """The prompts of a training."""
    task, train = settings.task, settings.train
    numbers = schedule(_or_task(train.prompt_numbers, str(task.numbers)), [str(size) for size in SIZES])
    style = schedule(_or_task(train.prompt_style, task.style), STYLES)
    problems = {size: task_of(settings).problems("train", size) for size in map(int, numbers.choices)}
    return Curriculum(problems, numbers, style, train.batch_size, train.seed)


def _or_task(text: str, of_task: str) -> str:
    return of_task if text == "task" else text


def splits(settings: Settings) -> dict[str, list[Problem]]:
    """The problems to train on, to select the best model on, and to report on.

    Raises CountdownError if one of them is empty or shares problems with another.
    """
    task, size = task_of(settings), settings.task.numbers
    problems = {"train": list(chain.from_iterable(curriculum(settings).problems.values()))}
    problems |= {"dev": list(task.problems("dev", size)), "val": list(task.problems("val", size))}
    require_apart(problems)
    return problems


def longest_prompt(settings: Settings, encode: Callable[[Sequence[dict[str, str]]], list[int]]) -> int:
    """Tokens of the longest prompt of some steps over the whole schedule, of at most PLANNED_PROMPTS."""
    task, prompts = task_of(settings), curriculum(settings)
    count = settings.train.num_iterations
    steps = range(1, count + 1, max(1, count // PLANNED_STEPS))
    drawn = (item for step in steps for item in prompts.prompts(step))
    return max(len(encode(task.prompt(problem, style))) for problem, style in islice(drawn, PLANNED_PROMPTS))
