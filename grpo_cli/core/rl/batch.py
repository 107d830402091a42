"""The completions of a step, their scores, and their sums over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from grpo_cli.core.rl.grpo import zero_variance
from grpo_cli.core.sampling.rollout import Rollout
from grpo_cli.core.task.prompts import Style
from grpo_cli.core.task.scoring import CHEATS, Score
from grpo_cli.core.task.task import Problem


@dataclass
class Batch:
    """A rank's completions of a step, P prompts by G, and what they are worth."""

    step: int
    places: list[int]  # of the prompts in the step
    puzzles: list[Problem]
    styles: list[Style]
    prompts: list[list[int]]
    rollout: Rollout
    texts: list[str]
    scores: list[Score]
    rewards: torch.Tensor  # (P, G)

    def record(self, row: int) -> dict[str, object]:
        """One completion, as samples.jsonl keeps it."""
        prompt_index, sample_index = divmod(row, self.rewards.shape[1])
        puzzle, found = self.puzzles[prompt_index], self.scores[row]
        return {
            "step": self.step,
            **puzzle.record(),
            "style": self.styles[prompt_index],
            "prompt_index": self.places[prompt_index],
            "sample_index": sample_index,
            "completion": self.texts[row],
            "reward": found.reward if math.isfinite(found.reward) else str(found.reward),
            "reason": found.reason,
            "answer": found.answer,
        }

    def take(self, other: Batch) -> None:
        """Put the groups of another batch, for some of the same places, where they tell samples apart."""
        size = self.rewards.shape[1]
        for index, place in enumerate(map(self.places.index, other.places)):
            if bool(zero_variance(other.rewards[index : index + 1])):
                continue
            self.puzzles[place], self.styles[place] = other.puzzles[index], other.styles[index]
            self.prompts[place], self.rewards[place] = other.prompts[index], other.rewards[index]
            here, there = slice(place * size, (place + 1) * size), slice(index * size, (index + 1) * size)
            self.texts[here], self.scores[here] = other.texts[there], other.scores[there]
            mine, theirs = self.rollout, other.rollout
            mine.completions[here], mine.logprobs[here] = theirs.completions[there], theirs.logprobs[there]
            mine.truncated[here] = theirs.truncated[there]

    def shown(self) -> list[dict[str, object]]:
        """A completion of each prompt, another one of its group every step."""
        prompts, generations = self.rewards.shape
        return [self.record(index * generations + self.step % generations) for index in range(prompts)]

    def tally(self) -> Tally:
        scores = self.scores
        sums = {
            "reward": sum(found.reward for found in scores),
            "accuracy": sum(found.correct for found in scores),
            "format_rate": sum(found.well_formed for found in scores),
            "completion_length": sum(map(len, self.rollout.completions)),
            "truncated": sum(self.rollout.truncated),
            "lenient_accuracy": sum(found.lenient for found in scores),
            **{f"cheat/{kind}": sum(found.cheat == kind for found in scores) for kind in CHEATS},
        }
        for name in sorted({name for score in scores for name in score.parts}):
            sums[f"reward/{name}"] = sum(score.parts.get(name, 0.0) for score in scores)
        return Tally(self.rewards.tolist(), sums)


@dataclass
class Tally:
    """What all ranks must know of the completions of one, or of all."""

    rewards: list[list[float]]  # P rows of G
    sums: dict[str, float]

    def __add__(self, other: Tally) -> Tally:
        names = {**self.sums, **other.sums}
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return Tally(self.rewards + other.rewards, sums)

    @property
    def tokens(self) -> int:
        return int(self.sums["completion_length"])

    def describe(self) -> dict[str, float]:
        """What the completions were like; shares are from 0 to 1."""
        rewards = torch.tensor(self.rewards)
        means = {name: value / rewards.numel() for name, value in self.sums.items()}
        return {**means, "zero_variance": float(zero_variance(rewards).float().mean()), "tokens": self.tokens}
