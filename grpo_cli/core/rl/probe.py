"""`train --probe`: sample a few dozen train puzzles as training would, and estimate whether a model could learn from
them.

A group has a gradient only if its rewards differ: it is called mixed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from statistics import fmean

import torch

from grpo_cli.core.evals.evaluate import Completion, Evaluator
from grpo_cli.core.evals.statistics import mcnemar, significant, wilson
from grpo_cli.core.rl.grpo import zero_variance
from grpo_cli.core.rl.health import LEARNED, judge
from grpo_cli.core.task.task import Problem

PUZZLES = 32
SECONDS = 110.0  # limit for a probe, without loading the model
FEW = 0.25  # mixed share below which most of a step is wasted


@dataclass(frozen=True)
class Sampled:
    """The groups of one style: shares are from 0 to 1; `right` and `mixed` have one entry per puzzle."""

    style: str
    num_generations: int
    right: list[int]  # correct completions of each group
    mixed: list[bool]  # whether the rewards of a group differ
    format_rate: float
    truncated: float
    mean_length: float  # tokens
    tokens: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return sum(self.right) / (len(self.right) * self.num_generations)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, by puzzles: completions of one puzzle are not independent."""
        return wilson(self.accuracy, len(self.right))

    @property
    def has_both(self) -> bool:
        """Whether a group has correct and wrong completions."""
        return any(0 < right < self.num_generations for right in self.right)

    @property
    def mixed_share(self) -> float:
        return fmean(self.mixed)


@dataclass(frozen=True)
class Probe:
    """A model's groups in every style, of the same puzzles; `chosen` is the style of the training."""

    chosen: str
    numbers: int
    styles: dict[str, Sampled]

    @property
    def findings(self) -> dict[str, str]:
        """Findings by name, each a sentence; the first says whether there is anything to learn."""
        sampled = self.styles[self.chosen]
        advice = {"signal": self._signal(sampled), **judge("truncated", {"truncated": sampled.truncated})}
        if not any(sampled.right):
            advice["never"] = "no completion was correct: use " + (
                "fewer `--numbers`, another `--model`, or `--warm-start`" if self.numbers > 2 else "another `--model`"
            )
        advice |= self._better_style(sampled)
        if sampled.has_both and sampled.accuracy < LEARNED and sampled.mixed_share < FEW:
            advice["groups"] = (
                "most groups have no gradient, and larger ones are mixed more often: raise `--num-generations`"
            )
        return advice

    def _signal(self, sampled: Sampled) -> str:
        mixed, groups = sum(sampled.mixed), len(sampled.mixed)
        seen = f"in {mixed} of {groups} {sampled.style} groups the rewards differ"
        if sampled.accuracy >= LEARNED:
            little = "little is left to learn" if mixed else "nothing is left to learn"
            return f"{little}: {sampled.accuracy:.0%} of the completions are correct, and {seen}; use more `--numbers`"
        if not mixed:
            return f"there is nothing to learn from: {seen}"
        if not sampled.has_both:
            return f"there is only the format to learn from: {seen}, but none has both correct and wrong completions"
        return f"there is something to learn from: {seen}"

    def _better_style(self, sampled: Sampled) -> dict[str, str]:
        """The style with most mixed groups, if significantly more than the chosen one (corrected for styles tried)."""
        others = [other for other in self.styles.values() if other is not sampled]
        best = max(others, key=lambda other: other.mixed_share, default=sampled)
        pairs = list(zip(sampled.mixed, best.mixed, strict=False))  # the puzzles that both have
        p_value = min(1.0, len(others) * mcnemar(pairs.count((False, True)), pairs.count((True, False))))
        if best.mixed_share <= sampled.mixed_share or not significant(p_value):
            return {}
        return {
            "style": f"{best.style} has {sum(best.mixed)} such groups on the same puzzles (p = {p_value:.2g}):"
            f" train with `--style {best.style}`"
        }


def chosen_puzzles(puzzles: Sequence[Problem], seed: int) -> list[Problem]:
    """The puzzles of a probe: a sample of at most PUZZLES, fixed by the seed."""
    return random.Random(f"probe/{seed}").sample(puzzles, min(PUZZLES, len(puzzles)))


def probe(
    evaluator: Evaluator,
    puzzles: Sequence[Problem],
    *,
    chosen: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Probe:
    """Sample a group of completions of each puzzle in every style.

    Stops if the next groups would exceed SECONDS. The chosen style comes first; the others may have fewer groups, or
    none. `progress` receives the groups done and their number.
    """
    task, size = evaluator.task, evaluator.batch_size // evaluator.params.num_generations
    chosen = chosen if chosen in task.styles else task.styles[0]
    order = sorted(task.styles, key=lambda style: style != chosen)
    groups: dict[str, list[list[Completion]]] = {style: [] for style in order}
    seconds, begin = dict.fromkeys(order, 0.0), clock()
    edges = [0, *range(1, len(puzzles), max(1, size)), len(puzzles)]  # first a single puzzle, to estimate the time
    for (first, last), style in product(pairwise(edges), order):
        slowest = max(seconds[name] / max(1, len(own)) for name, own in groups.items())  # per group
        start = clock()
        if groups[chosen] and start - begin + slowest * (last - first) > SECONDS:
            break
        seeded = replace(evaluator, seed=evaluator.seed + first)
        groups[style] += seeded.evaluate(puzzles[first:last], style=style, split="train").completions
        seconds[style] += clock() - start
        progress(sum(map(len, groups.values())), len(order) * len(puzzles))
    styles = {style: measure(style, groups[style], seconds[style]) for style in task.styles if groups[style]}
    return Probe(chosen, puzzles[0].size, styles)


def measure(style: str, groups: Sequence[Sequence[Completion]], seconds: float) -> Sampled:
    """The groups sampled in one style; all have the same size."""
    everything = [completion for group in groups for completion in group]
    rewards = torch.tensor([[completion.score.reward for completion in group] for group in groups])  # (P, G)
    tokens = sum(completion.length for completion in everything)
    return Sampled(
        style=style,
        num_generations=len(groups[0]),
        right=[sum(completion.score.correct for completion in group) for group in groups],
        mixed=(~zero_variance(rewards)).tolist(),
        format_rate=fmean(completion.score.well_formed for completion in everything),
        truncated=fmean(completion.truncated for completion in everything),
        mean_length=tokens / len(everything),
        tokens=tokens,
        seconds=seconds,
    )
