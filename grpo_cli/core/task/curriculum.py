"""The prompts of a training: the puzzles and styles of each step.

A schedule is one line:

    one-shot                                              a single choice
    one-shot = 0.5, zero-shot = 0.5                       a mixture, drawn independently per prompt
    one-shot -> zero-shot, linear over 20 steps           the first fades into the second

All draws are functions of (seed, step, prompt), so a resumed training draws the same prompts.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from grpo_cli.core.task.task import Problem

_FADE = re.compile(r"(.+?)\s*->\s*(.+?)\s*,?\s+(?:linear\s+)?over\s+([0-9]{1,9})\s+steps?")


@dataclass(frozen=True)
class Schedule:
    """Weights of the choices at the start and at the end, and the `steps` of the linear fade between them."""

    first: Mapping[str, float]
    last: Mapping[str, float]
    steps: int = 0

    def weights(self, step: int) -> dict[str, float]:
        """Probability of each choice in a step, from 1."""
        share = min(1.0, (step - 1) / self.steps) if self.steps else 1.0
        return {
            name: (1 - share) * self.first.get(name, 0.0) + share * self.last.get(name, 0.0) for name in self.choices
        }

    @property
    def choices(self) -> list[str]:
        """All possible choices."""
        return [*self.first, *(name for name in self.last if name not in self.first)]

    def draw(self, step: int, key: str) -> str:
        """The choice of a step for `key`, which identifies the draw."""
        weights = self.weights(step)
        return random.Random(f"{key}/{step}").choices(list(weights), list(weights.values()))[0]


def schedule(text: str, choices: Collection[str]) -> Schedule:
    """Parse `text` as a schedule of some of `choices`; raises ValueError with the problem."""
    text = text.strip()
    if match := _FADE.fullmatch(text):
        if int(match[3]) < 1:
            raise ValueError("a fade takes at least 1 step")
        return Schedule(_mixture(match[1], choices), _mixture(match[2], choices), int(match[3]))
    mixture = _mixture(text, choices)
    return Schedule(mixture, mixture)


def _mixture(text: str, choices: Collection[str]) -> dict[str, float]:
    """Weights that sum to 1, from `a` or `a = 1, b = 3`, with or without braces."""
    parts = [part.strip() for part in text.strip("{} ").split(",")]
    weights: dict[str, float] = {}
    for part in parts:
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name not in choices:
            raise ValueError(f"`{name}` is not one of {', '.join(choices)}")
        if name in weights:
            raise ValueError(f"`{name}` is listed twice")
        if not equals and len(parts) > 1:
            raise ValueError(f"`{name}` has no weight")
        if equals and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}", weight):
            raise ValueError(f"`{weight}` is not a weight")
        weights[name] = float(weight) if equals else 1.0
    total = sum(weights.values())
    if total == 0:
        raise ValueError("the weights are all 0")
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def problems_of_step(problems: Sequence[Problem], step: int, *, batch_size: int, seed: int | str) -> list[Problem]:
    """The problems of a step, from 1. Every epoch visits all problems once, in its own order."""
    places = range((step - 1) * batch_size, step * batch_size)
    orders: dict[int, list[int]] = {}
    drawn = []
    for epoch, index in (divmod(place, len(problems)) for place in places):
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed}/{epoch}").sample(range(len(problems)), len(problems))
        drawn.append(problems[orders[epoch][index]])
    return drawn


@dataclass(frozen=True)
class Curriculum:
    """The prompts of every step. `problems` has all problems by size."""

    problems: Mapping[int, Sequence[Problem]]
    numbers: Schedule
    style: Schedule
    batch_size: int
    seed: int

    def prompts(self, step: int, *, turn: int = 0) -> list[tuple[Problem, str]]:
        """The problems of a step, from 1, and their styles. Later turns use other orders of the problems.

        Each size has its own order; a prompt of another size skips its position.
        """
        seed = f"{self.seed}/{turn}" if turn else str(self.seed)
        drawn = {
            size: problems_of_step(problems, step, batch_size=self.batch_size, seed=seed)
            for size, problems in self.problems.items()
        }
        prompts = []
        for index in range(self.batch_size):
            size = int(self.numbers.draw(step, f"{seed}/numbers/{index}"))
            style = self.style.draw(step, f"{seed}/style/{index}")
            prompts.append((drawn[size][index], style))
        return prompts

    def shares(self, prompts: Sequence[tuple[Problem, str]]) -> dict[str, float]:
        """Metrics: the share of each style and size among a step's prompts, if there are several."""
        styles = Counter(style for _, style in prompts)
        sizes = Counter(str(problem.size) for problem, _ in prompts)
        counted: dict[str, float] = {}
        for schedule, counts, unit in ((self.style, styles, ""), (self.numbers, sizes, " numbers")):
            if len(schedule.choices) > 1:
                counted |= {f"prompts/{name}{unit}": counts[name] / len(prompts) for name in schedule.choices}
        return counted
