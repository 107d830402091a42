"""Collect the groups of a step: draw prompts, sample completions, score them.

The samples are a function of (seed, step, prompt index), whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from statistics import fmean

import torch

from grpo_cli.core.config.settings import Reward, Train
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.templates import encode
from grpo_cli.core.perf.utilization import Meter
from grpo_cli.core.rl.batch import Batch, Group, Tally
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.grpo import overlong_penalty, zero_variance
from grpo_cli.core.rl.schedule import Problems
from grpo_cli.core.rollout.engine import Engine, uniforms
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.task import Problem, Score, Task


@dataclass
class Collector:
    """Collects each step's groups; each rank samples its share of the prompts."""

    engine: Engine
    problems: Problems
    settings: Train
    reward: Reward
    context: Context
    clock: Clock
    meter: Meter
    micro_batch: MicroBatch
    templated: float = 1.0  # share of this rank's last prompts that the model's chat template made

    @property
    def task(self) -> Task:
        return self.problems.task

    def collect(self, step: int) -> Batch:
        """Sample and score a step; with dynamic sampling, replace groups of equal rewards."""
        self.meter.reset()
        with self.clock.phase("rollout"):
            self.engine.update_weights()
        groups, tally = self._draw(step, range(self.settings.batch_size), 0)
        metrics = tally.means() | self.problems.curriculum.shares(self.problems.curriculum.prompts(step))
        batch = Batch(step, groups, tally, metrics, tally.tokens)
        metrics["templated"] = fmean(self.context.world.gather(self.templated))
        if self.settings.dynamic_sampling:
            self._replace(batch)
        return batch

    def _replace(self, batch: Batch) -> None:
        """Replace groups of equal rewards, as DAPO does (arXiv 2503.14476).

        At most `dynamic_sampling` times, with puzzles of a separate order, so later steps do not change; groups that
        are still equal then stay. Metrics describe the first draw, because the replaced groups are a biased sample.
        """
        first = equal = zero_variance(batch.tally.rewards)  # (P,)
        for turn in range(1, self.settings.dynamic_sampling + 1):
            indices = equal.nonzero()[:, 0].tolist()
            if not indices:
                break
            groups, drawn = self._draw(batch.number, indices, turn)
            batch.tokens += drawn.tokens
            batch.replace(groups)
            batch.tally = self._tally(batch.groups)
            equal = zero_variance(batch.tally.rewards)
        batch.metrics["refilled"] = float(first.sum() - equal.sum()) / len(equal)

    def _draw(self, step: int, indices: Sequence[int], turn: int) -> tuple[list[Group], Tally]:
        """This rank's groups of the prompts at `indices`, and the tally of all ranks. Later turns use other prompts."""
        mine = [index for index in self.context.world.share(self.settings.batch_size) if index in indices]
        groups = self.context.world.agree(partial(self._sample, step, mine, turn))
        return groups, self._tally(groups)

    def _tally(self, groups: Sequence[Group]) -> Tally:
        """The tally of all ranks' groups."""
        own = Tally.of(groups, size=self.settings.num_generations, cheats=self.task.cheats)
        return reduce(add, self.context.world.gather(own))

    def _score(self, text: str, problem: Problem, style: str, truncated: bool, length: int) -> Score:
        """The task's score minus the length penalty of `length` tokens."""
        score, reward = self.task.score(text, problem, style=style, truncated=truncated), self.reward
        if not reward.length_penalty:
            return score
        limits = {"soft_limit": reward.soft_limit, "max_new_tokens": self.settings.max_new_tokens}
        penalty = reward.length_penalty * overlong_penalty(length, **limits)
        return replace(score, reward=score.reward - penalty, parts={**score.parts, "length": -penalty})

    def _on_token(self, count: int) -> None:
        self.context.observer.progress("sampling token", count, self.settings.max_new_tokens)
        self.context.poll()

    def _sample(self, step: int, indices: list[int], turn: int) -> list[Group]:
        settings, size = self.settings, self.settings.num_generations
        prompts = self.problems.curriculum.prompts(step, turn=turn)
        drawn = [prompts[index] for index in indices]
        policy = self.engine.policy
        messages = [self.task.prompt(problem, style) for problem, style in drawn]
        encoded = [policy.encode(chat) for chat in messages]
        # Encoded again, to measure whether prompts follow the template: a planted bug replaces `Policy.encode`.
        templated = [encode(policy.tokenizer, chat) == tokens for chat, tokens in zip(messages, encoded, strict=True)]
        self.templated = fmean(templated) if templated else 1.0
        with self.clock.phase("rollout"):
            rollout = self.engine.sample(
                encoded,
                SamplingParams.training(settings),
                uniform=uniforms(
                    settings.seed,
                    step,
                    [turn * settings.batch_size + index for index in indices],
                    size,
                    settings.max_new_tokens,
                ),
                micro_batch=self.micro_batch,
                on_token=self._on_token,
            )
        self.clock.add(rollout.seconds)
        self.meter.sampled(encoded, rollout)
        groups = []
        with self.clock.phase("score"):
            for number, (index, (problem, style)) in enumerate(zip(indices, drawn, strict=True)):
                rows = slice(number * size, (number + 1) * size)
                completions, truncated = rollout.completions[rows], rollout.truncated[rows]
                texts = [policy.decode(tokens) for tokens in completions]
                scores = [
                    self._score(text, problem, style, cut, len(tokens))
                    for text, cut, tokens in zip(texts, truncated, completions, strict=True)
                ]
                rewards = torch.tensor([score.reward for score in scores])  # (G,)
                logprobs = rollout.logprobs[rows]
                groups.append(
                    Group(
                        index, problem, style, encoded[number], completions, logprobs, truncated, texts, scores, rewards
                    )
                )
        return groups
