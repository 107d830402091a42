"""`train --probe`: sample a few dozen train puzzles as training would, and estimate whether a model could learn from
them.

A group has a gradient only if its rewards differ: it is called mixed.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

import torch

from grpo_cli.core.evals.evaluate import Completion, Evaluator
from grpo_cli.core.evals.statistics import mcnemar, significant, wilson
from grpo_cli.core.rl.grpo import zero_variance
from grpo_cli.core.rl.health import LEARNED, judge
from grpo_cli.core.task.task import Problem, Task

PUZZLES = 32
SECONDS = 110.0  # limit for a probe, without loading the model
TIGHT = 0.2  # sufficient width of the interval of the mixed share: 16 puzzles without a mixed group
FEW = 0.25  # mixed share below which most of a step is wasted
WORTH = 0.15  # increase of the mixed share that justifies larger groups
# Grid of Beta distributions of success: means, and a + b, from "always or never" to "all equal".
MEANS = [0.001, 0.003, *[index / 100 for index in range(1, 100)], 0.997, 0.999]
WEIGHTS = [0.1 * 1.3**index for index in range(30)]


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
    def mixed_share(self) -> float:
        return fmean(self.mixed)


@dataclass(frozen=True)
class Probe:
    """A model's groups in every style, of the same puzzles; `chosen` is the style of the training."""

    chosen: str
    numbers: int
    styles: dict[str, Sampled]

    @property
    def expected_mixed(self) -> dict[int, float]:
        """Estimated share of groups of the chosen style with right and wrong completions, by group size."""
        sampled = self.styles[self.chosen]
        sizes = [sampled.num_generations * factor for factor in (1, 2, 4)]
        return expected_mixed(sampled.right, sampled.num_generations, sizes)

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
        if any(sampled.right) and sampled.accuracy < LEARNED and sampled.mixed_share < FEW:
            advice |= self._larger_groups(sampled)
        return advice

    def _signal(self, sampled: Sampled) -> str:
        mixed, groups = sum(sampled.mixed), len(sampled.mixed)
        seen = f"in {mixed} of {groups} {sampled.style} groups the rewards differ"
        if sampled.accuracy >= LEARNED:
            little = "little is left to learn" if mixed else "nothing is left to learn"
            return f"{little}: {sampled.accuracy:.0%} of the completions are correct, and {seen}; use more `--numbers`"
        if not mixed:
            return f"there is nothing to learn from: {seen}"
        if not any(0 < right < sampled.num_generations for right in sampled.right):
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

    def _larger_groups(self, sampled: Sampled) -> dict[str, str]:
        now, *larger = self.expected_mixed.items()
        enough = [(size, share) for size, share in larger if share - now[1] >= WORTH]
        if not enough:
            return {}
        size, share = enough[0]
        return {
            "groups": f"in groups of {now[0]} an estimated {now[1]:.0%} hold right and wrong completions, of {size}"
            f" {share:.0%}, at {size // now[0]} times the cost: raise `--num-generations`"
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

    Stops if the next groups would exceed SECONDS, or once the 95 % interval of the share of mixed groups is no wider
    than TIGHT: without any mixed group, half the puzzles suffice. The chosen style comes first; the others may have
    fewer groups, or none. `progress` receives the groups done and their number.
    """
    task, size = evaluator.task, evaluator.batch_size // evaluator.params.num_generations
    chosen = chosen if chosen in task.styles else task.styles[0]
    order = sorted(task.styles, key=lambda style: style != chosen)
    groups: dict[str, list[list[Completion]]] = {style: [] for style in order}
    seconds = dict.fromkeys(order, 0.0)
    begin = clock()
    for first, last in _chunks(len(puzzles), max(1, size)):
        for style in order:
            slowest = max(seconds[style] / max(1, len(groups[style])) for style in order)  # per group
            start = clock()
            if groups[chosen] and start - begin + slowest * (last - first) > SECONDS:
                return _probe(chosen, task, puzzles, groups, seconds)
            seeded = replace(evaluator, seed=evaluator.seed + first)
            groups[style] += seeded.evaluate(puzzles[first:last], style=style, split="train").completions
            seconds[style] += clock() - start
            progress(sum(map(len, groups.values())), len(order) * len(puzzles))
        low, high = wilson(measure(chosen, groups[chosen], 0.0).mixed_share, last)
        if high - low <= TIGHT:
            break
    return _probe(chosen, task, puzzles, groups, seconds)


def _chunks(count: int, size: int) -> list[tuple[int, int]]:
    """Ranges of puzzles: first a single one, to estimate the time, then `size` at once."""
    edges = [0, *range(1, count, size), count]
    return list(itertools.pairwise(edges))


def _probe(
    chosen: str,
    task: Task,
    puzzles: Sequence[Problem],
    groups: Mapping[str, Sequence[Sequence[Completion]]],
    seconds: Mapping[str, float],
) -> Probe:
    """The probe of the sampled groups, its styles in the task's order."""
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


def expected_mixed(right: Sequence[int], of: int, sizes: Sequence[int]) -> dict[int, float]:
    """Estimated share of groups with right and wrong completions, by size, from a group of `of` for each puzzle.

    The chances of success p are modelled by one Beta(a, b), the most likely of a grid. A puzzle's posterior is then
    Beta(a + right, b + of - right): a puzzle never solved in 8 tries may be solved in 32. The estimate is the mean over
    puzzles of 1 - E[p^n] - E[(1 - p)^n].
    """
    counts = {hits: list(right).count(hits) for hits in set(right)}

    def log_likelihood(prior: tuple[float, float]) -> float:
        a, b = prior
        return sum(count * (_log_beta(a + hits, b + of - hits) - _log_beta(a, b)) for hits, count in counts.items())

    priors = [(mean * weight, (1 - mean) * weight) for mean, weight in product(MEANS, WEIGHTS)]
    a, b = max(priors, key=log_likelihood)
    return {
        size: sum(count * _mixed(a + hits, b + of - hits, size) for hits, count in counts.items()) / len(right)
        for size in sizes
    }


def _mixed(a: float, b: float, size: int) -> float:
    """Probability that a group has right and wrong completions if p is drawn from Beta(a, b)."""
    all_right, all_wrong = _log_beta(a + size, b), _log_beta(a, b + size)
    return 1 - math.exp(all_right - _log_beta(a, b)) - math.exp(all_wrong - _log_beta(a, b))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
