"""Accuracy of a policy on a set of puzzles, with everything needed to see why it fails.

By default the set is *all* val puzzles and decoding is greedy, so two models are compared on the same puzzles without
sampling error. Knows neither training nor terminals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from grpo_cli.core.memory import Fit
from grpo_cli.core.policy import Policy
from grpo_cli.core.puzzle import ENUMERABLE, Puzzle, Split, enumerate_puzzles, generate, needs_parentheses, solve
from grpo_cli.core.rollout import draws, sample
from grpo_cli.core.task import Score, Style, prompt, score

GENERATED = 2_000  # puzzles drawn where the space is too large
Z = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Completion:
    """A scored completion. `length` is in tokens; `truncated` says that it ran out of them."""

    puzzle: Puzzle
    text: str
    length: int
    truncated: bool
    score: Score


@dataclass(frozen=True)
class Evaluation:
    """All completions of one model on one set of puzzles, a list of `samples` for each puzzle."""

    model: str
    split: str
    style: str
    numbers: int
    samples: int
    temperature: float
    completions: list[list[Completion]]

    @cached_property
    def _all(self) -> list[Completion]:
        return [completion for row in self.completions for completion in row]

    @property
    def count(self) -> int:
        """Puzzles."""
        return len(self.completions)

    @property
    def accuracy(self) -> float:
        """Share of completions that are correct."""
        return _mean([completion.score.correct for completion in self._all])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, counting puzzles: completions of one puzzle are not independent."""
        return wilson(self.accuracy, self.count)

    @property
    def lenient_accuracy(self) -> float:
        """Share that is correct when the notation is read leniently; never a reward."""
        return _mean([completion.score.lenient for completion in self._all])

    @property
    def format_rate(self) -> float:
        """Share of completions with both tag pairs."""
        return _mean([completion.score.well_formed for completion in self._all])

    @property
    def mean_length(self) -> float:
        """Mean tokens of a completion."""
        return _mean([completion.length for completion in self._all])

    @property
    def reasons(self) -> dict[str, int]:
        """Completions by the reason of their score."""
        return dict(Counter(completion.score.reason for completion in self._all))

    @property
    def cheats(self) -> dict[str, int]:
        """Completions by the kind of cheat that they tried, of those that did."""
        return dict(Counter(completion.score.cheat for completion in self._all if completion.score.cheat))

    @property
    def pass_at_k(self) -> float | None:
        """Share of puzzles that at least one of several samples solves."""
        if self.samples == 1:
            return None
        return _mean([any(completion.score.correct for completion in row) for row in self.completions])

    @property
    def slices(self) -> dict[str, tuple[int, int]]:
        """(correct, all) completions of the puzzles of each kind."""
        kinds: dict[str, Callable[[Puzzle], bool]] = {
            "needs parentheses": needs_parentheses,
            "no parentheses needed": lambda puzzle: not needs_parentheses(puzzle),
            "one solution": lambda puzzle: len(solve(puzzle)) == 1,
            "several solutions": lambda puzzle: len(solve(puzzle)) > 1,
        }
        return {kind: _slice(self.completions, belongs) for kind, belongs in kinds.items()}

    def to_json(self) -> dict[str, object]:
        """The machine-readable result."""
        return {
            "model": self.model,
            "split": self.split,
            "style": self.style,
            "numbers": self.numbers,
            "count": self.count,
            "samples": self.samples,
            "temperature": self.temperature,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "lenient_accuracy": self.lenient_accuracy,
            "format_rate": self.format_rate,
            "mean_length": self.mean_length,
            "reasons": self.reasons,
            "cheats": self.cheats,
            "pass_at_k": self.pass_at_k,
        }

    def records(self) -> Iterator[dict[str, object]]:
        """Every completion as a JSON object."""
        for completion in self._all:
            yield {
                "numbers": list(completion.puzzle.numbers),
                "target": completion.puzzle.target,
                "completion": completion.text,
                "length": completion.length,
                "reward": completion.score.reward,
                "reason": completion.score.reason,
                "answer": completion.score.answer,
            }


@dataclass(frozen=True)
class Paired:
    """Two models on the same puzzles, one completion each: the pairs (first's, second's) of which one is right."""

    first: str
    second: str
    gained: list[tuple[Completion, Completion]]  # right only in the second
    lost: list[tuple[Completion, Completion]]

    @property
    def p_value(self) -> float:
        """How likely so uneven a split would be by chance."""
        return mcnemar(len(self.gained), len(self.lost))

    def to_json(self) -> dict[str, object]:
        """The machine-readable result."""
        found = {"first": self.first, "second": self.second, "gained": len(self.gained), "lost": len(self.lost)}
        return {**found, "p_value": self.p_value}


def paired(first: Evaluation, second: Evaluation) -> Paired | None:
    """What the second model gains and loses; None unless both have one completion of each of the same puzzles."""
    if first.samples > 1 or second.samples > 1:
        return None
    pairs = list(zip(first._all, second._all, strict=False))
    if len(first._all) != len(second._all) or any(one.puzzle != other.puzzle for one, other in pairs):
        return None
    gained = [pair for pair in pairs if pair[1].score.correct and not pair[0].score.correct]
    lost = [pair for pair in pairs if pair[0].score.correct and not pair[1].score.correct]
    return Paired(first.model, second.model, gained, lost)


def mcnemar(gained: int, lost: int) -> float:
    """p of so uneven a split if gains and losses are equally likely: the exact, two-sided test of McNemar (1947)."""
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, float(Fraction(2 * tail, 1 << changed)))


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen in `count` trials (Wilson 1927)."""
    spread = Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def puzzle_set(numbers: int, split: Split) -> list[Puzzle]:
    """All puzzles of a split; for more than four numbers a fixed sample of them."""
    if numbers <= ENUMERABLE:
        return list(enumerate_puzzles(numbers=numbers, split=split))
    return generate(GENERATED, numbers=numbers, split=split, seed=0)


def evaluate(
    policy: Policy,
    puzzles: Sequence[Puzzle],
    *,
    style: Style,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    fit: Fit | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Evaluation:
    """Complete and score every puzzle; greedily if `temperature` is 0, else `samples` times. All have the same size.

    `batch_size` is how many completions are decoded at once, fewer if `fit` finds that too many. `progress` is told
    how many puzzles of how many are done.
    """
    fit = fit or Fit()
    rows: list[list[Completion]] = []
    size = max(1, batch_size // samples)
    for start in range(0, len(puzzles), size):
        chunk = puzzles[start : start + size]
        indices = range(start, start + len(chunk))
        rollout = sample(
            policy,
            [policy.encode(prompt(puzzle, style)) for puzzle in chunk],
            num_generations=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature or 1.0,
            uniform=draws(seed, 0, indices, samples, max_new_tokens) if temperature else None,
            fit=fit,
            on_token=on_token,
        )
        scored = [
            _completion(policy, chunk[row // samples], tokens, truncated, style)
            for row, (tokens, truncated) in enumerate(zip(rollout.completions, rollout.truncated, strict=True))
        ]
        rows += [scored[first : first + samples] for first in range(0, len(scored), samples)]
        if progress is not None:
            progress(len(rows), len(puzzles))
    first = puzzles[0]
    return Evaluation(policy.name, first.split, style, len(first.numbers), samples, temperature, rows)


def _completion(policy: Policy, puzzle: Puzzle, tokens: list[int], truncated: bool, style: Style) -> Completion:
    text = policy.decode(tokens)
    return Completion(puzzle, text, len(tokens), truncated, score(text, puzzle, style=style, truncated=truncated))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _slice(rows: list[list[Completion]], belongs: Callable[[Puzzle], bool]) -> tuple[int, int]:
    chosen = [completion.score.correct for row in rows if belongs(row[0].puzzle) for completion in row]
    return sum(chosen), len(chosen)
