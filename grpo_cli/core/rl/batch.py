"""Groups of completions, from sampling to the loss.

A group holds its tokens, the sampler's log-probabilities, texts, scores, rewards and advantages. Ranks exchange a
`Tally` of rewards and sums, not completions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.model.policy import Sequences
from grpo_cli.core.rl.grpo import Step, zero_variance
from grpo_cli.core.task.task import Problem, Score


@dataclass
class Group:
    """The G completions of one prompt."""

    prompt_index: int  # index of the prompt in the step
    problem: Problem
    style: str
    prompt: list[int]
    completions: list[list[int]]
    logprobs: list[list[float]]  # per token, as computed by the sampler
    truncated: list[bool]
    texts: list[str]
    scores: list[Score]
    rewards: Tensor  # (G,)
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))  # (G,), set after the whole step is scored

    def sample_record(self, step: int, sample: int) -> dict[str, object]:
        """One completion as a line of samples.jsonl."""
        score = self.scores[sample]
        return {
            "step": step,
            **self.problem.record(),
            "style": self.style,
            "prompt_index": self.prompt_index,
            "sample_index": sample,
            "completion": self.texts[sample],
            "reward": _number(score.reward),
            "reason": score.reason,
            "answer": score.answer,
        }

    def group_record(self, step: int) -> dict[str, Any]:
        """All completions, with rewards and advantages, as a line of groups.jsonl.gz."""
        rows = zip(self.texts, self.scores, self.advantages.tolist(), self.completions, self.truncated, strict=True)
        completions = [
            {
                "completion": text,
                "reward": _number(score.reward),
                "parts": {name: _number(value) for name, value in score.parts.items()},
                "advantage": _number(advantage),
                "length": len(tokens),
                "truncated": cut,
                "correct": score.correct,
                "reason": score.reason,
                "answer": score.answer,
                "sample_index": sample,
            }
            for sample, (text, score, advantage, tokens, cut) in enumerate(rows)
        ]
        place = {"style": self.style, "prompt_index": self.prompt_index}
        return {"step": step, **self.problem.record(), **place, "completions": completions}


def _number(value: float) -> float | str:
    """The value, as text if JSON has no such number."""
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Tally:
    """Rewards (P, G) of groups, and sums over their completions."""

    rewards: Tensor
    sums: dict[str, float]
    tokens: int
    cut: int  # tokens of truncated completions

    @classmethod
    def of(cls, groups: Sequence[Group], *, size: int, cheats: Sequence[str]) -> Tally:
        """The tally of groups of `size` completions; `groups` may be empty."""
        scores = [score for group in groups for score in group.scores]
        tokens = sum(len(completion) for group in groups for completion in group.completions)
        sums = {
            "reward": sum(score.reward for score in scores),
            "accuracy": sum(score.correct for score in scores),
            "format_rate": sum(score.well_formed for score in scores),
            "completion_length": tokens,
            "truncated": sum(sum(group.truncated) for group in groups),
            "lenient_accuracy": sum(score.lenient for score in scores),
            "distinct": sum(len({*group.texts}) for group in groups),
            "reward_margin": sum(score.reward for score in scores if score.correct),
            **{f"cheat/{kind}": sum(score.cheat == kind for score in scores) for kind in cheats},
            **_named("reward", [score.parts for score in scores]),
            **_named("behaviour", [score.behaviour for score in scores]),
        }
        rewards = torch.stack([group.rewards for group in groups]) if groups else torch.zeros(0, size)
        pairs = [pair for group in groups for pair in zip(group.completions, group.truncated, strict=True)]
        return cls(rewards, sums, tokens, sum(len(completion) for completion, cut in pairs if cut))

    def __add__(self, other: Tally) -> Tally:
        names = {**self.sums, **other.sums}
        sums = {name: self.sums.get(name, 0) + other.sums.get(name, 0) for name in names}
        rewards = torch.cat([self.rewards, other.rewards])
        return Tally(rewards, sums, self.tokens + other.tokens, self.cut + other.cut)

    def means(self) -> dict[str, float]:
        """Metrics: the mean of each sum, the share of groups with equal rewards, and what correct ones earn more."""
        means = {name: value / self.rewards.numel() for name, value in self.sums.items()}
        earned, right = means.pop("reward_margin"), means["accuracy"]
        if 0 < right < 1:
            means["reward_margin"] = earned / right - (means["reward"] - earned) / (1 - right)
        return {**means, "zero_variance": float(zero_variance(self.rewards).float().mean())}


def _named(family: str, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums of named values, as metrics of a family."""
    names = dict.fromkeys(name for own in parts for name in own)
    return {f"{family}/{name}": sum(own.get(name, 0.0) for own in parts) for name in names}


@dataclass(frozen=True)
class Examples:
    """Input of an update: B completions in groups, their advantages (B,), and log-probabilities.

    `step` counts the completions of all ranks, by default only these. `ref_logprobs` (B, T) are the reference's,
    `sampled_logprobs` the sampler's, `plain_logprobs` (C,) those of some rows by the model's own forward, from which
    the update measures `logprob_gap`.
    """

    sequences: Sequences
    advantages: Tensor
    sampled_logprobs: Sequence[Sequence[float]] = ()
    ref_logprobs: Tensor | None = None
    step: Step | None = None
    truncated: Sequence[bool] = ()
    plain_logprobs: Mapping[int, Tensor] = field(default_factory=dict)

    def masked(self, loss: Loss) -> Tensor:
        """The truncated rows (B,) that the loss leaves out."""
        if not self.truncated or not loss.mask_truncated:
            return torch.zeros(self.advantages.shape, dtype=torch.bool)
        return torch.tensor(self.truncated)

    def learning(self, loss: Loss) -> Tensor:
        """The rows (B,) with a gradient."""
        return ((self.advantages != 0) | loss.always_has_gradient) & ~self.masked(loss)


@dataclass
class Batch:
    """This rank's groups of a step, and the metrics of all ranks' groups."""

    number: int  # of the step
    groups: list[Group]
    tally: Tally  # of all ranks
    metrics: dict[str, float]  # of the groups before dynamic sampling
    tokens: int  # sampled by all ranks, including replaced groups

    @property
    def completions(self) -> list[list[int]]:
        return [completion for group in self.groups for completion in group.completions]

    @property
    def sequences(self) -> Sequences:
        """The completions (B rows), group after group."""
        prompt_index = [index for index, group in enumerate(self.groups) for _ in group.completions]
        return Sequences([group.prompt for group in self.groups], self.completions, prompt_index)

    @property
    def advantages(self) -> Tensor:
        """(B,)"""
        return torch.cat([group.advantages for group in self.groups]) if self.groups else torch.zeros(0)

    def lengths(self, *, learned: bool = False) -> list[tuple[int, list[int]]]:
        """Tokens of this rank's prompts and their completions; `learned`: only of completions with an advantage."""
        groups = []
        for group in self.groups:
            rows = zip(group.completions, group.advantages.tolist(), strict=True)
            lengths = [len(tokens) for tokens, advantage in rows if advantage or not learned]
            groups += [(len(group.prompt), lengths)] if lengths else []
        return groups

    def kl_to(self, ref_logprobs: Tensor) -> Tensor:
        """The KL (B,) from the reference of each of this rank's completions: k1 summed over its tokens."""
        rows = [row for group in self.groups for row in group.logprobs]
        return torch.tensor(
            [sum(row) - float(ref[: len(row)].sum()) for row, ref in zip(rows, ref_logprobs, strict=True)]
        )

    def set_advantages(self, advantages: Tensor) -> None:
        """Give each group its row of the whole step's advantages (P, G)."""
        for group in self.groups:
            group.advantages = advantages[group.prompt_index]

    def examples(self, ref_logprobs: Tensor | None, *, has_gradient: bool, mask_truncated: bool = False) -> Examples:
        """The examples of an update; `has_gradient`: whether any rank has a nonzero gradient.

        With `mask_truncated`, completions at the token limit do not count.
        """
        tokens = self.tally.tokens - (self.tally.cut if mask_truncated else 0)
        step = Step(self.tally.rewards.numel(), tokens, has_gradient and tokens > 0)
        logprobs = [row for group in self.groups for row in group.logprobs]
        truncated = [cut for group in self.groups for cut in group.truncated]
        return Examples(self.sequences, self.advantages, logprobs, ref_logprobs, step, truncated)

    def replace(self, groups: Sequence[Group]) -> None:
        """Replace groups by those of `groups` with the same prompt index whose rewards differ."""
        useful = {group.prompt_index: group for group in groups if not bool(zero_variance(group.rewards[None]))}
        self.groups = [useful.get(group.prompt_index, group) for group in self.groups]

    def sample_records(self) -> list[dict[str, object]]:
        """One completion per prompt for samples.jsonl, another one of the group each step."""
        return [group.sample_record(self.number, self.number % len(group.completions)) for group in self.groups]

    def group_records(self) -> list[dict[str, Any]]:
        """All completions of each prompt, for groups.jsonl.gz."""
        return [group.group_record(self.number) for group in self.groups]
