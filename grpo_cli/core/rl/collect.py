"""Collect the groups of a step: draw prompts, sample completions, score them.

The samples are a function of (seed, step, prompt index), whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch

from grpo_cli.core.config.settings import Reward, Train
from grpo_cli.core.dist.ranks import Solo
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.perf.utilization import Meter
from grpo_cli.core.rl.batch import Batch, Group, Tally
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.grpo import overlong_penalty, zero_variance
from grpo_cli.core.sampling.params import SamplingParams
from grpo_cli.core.sampling.rollout import Engine, uniforms
from grpo_cli.core.task.curriculum import Curriculum
from grpo_cli.core.task.task import Problem, Score, Task


@dataclass
class Collector:
    """Collects each step's groups; each rank samples its share of the prompts. `on_token` may raise to stop."""

    engine: Engine
    task: Task
    curriculum: Curriculum
    settings: Train
    reward: Reward
    ranks: Solo
    fit: MicroBatch
    on_token: Callable[[int], None]

    def collect(self, step: int, clock: Clock, meter: Meter) -> Batch:
        """Sample and score a step; with dynamic sampling, replace groups of equal rewards."""
        groups, tally = self._draw(step, range(self.settings.batch_size), 0, clock, meter)
        metrics = tally.means() | self.curriculum.shares(self.curriculum.prompts(step))
        batch = Batch(step, groups, tally, metrics, tally.tokens)
        if self.settings.dynamic_sampling:
            self._replace(batch, clock, meter)
        return batch

    def _replace(self, batch: Batch, clock: Clock, meter: Meter) -> None:
        """Replace groups of equal rewards, as DAPO does (arXiv 2503.14476).

        At most `dynamic_sampling` times, with puzzles of a separate order, so later steps do not change; groups that
        are still equal then stay. Metrics describe the first draw, because the replaced groups are a biased sample.
        """
        first = flat = zero_variance(batch.tally.rewards)
        for turn in range(1, self.settings.dynamic_sampling + 1):
            places = flat.nonzero()[:, 0].tolist()
            if not places:
                break
            groups, drawn = self._draw(batch.number, places, turn, clock, meter)
            batch.tokens += drawn.tokens
            batch.replace(groups)
            batch.tally = reduce(add, self.ranks.each(lambda: self._tally(batch.groups)))
            flat = zero_variance(batch.tally.rewards)
        batch.metrics["refilled"] = float(first.sum() - flat.sum()) / len(flat)

    def _draw(
        self, step: int, places: Sequence[int], turn: int, clock: Clock, meter: Meter
    ) -> tuple[list[Group], Tally]:
        """This rank's groups of the prompts at `places`, and the tally of all ranks. Later turns use other prompts."""
        mine = [place for place in self.ranks.share(self.settings.batch_size) if place in places]
        groups: list[Group] = []

        def work() -> Tally:
            groups.extend(self._sample(step, mine, turn, clock, meter))
            return self._tally(groups)

        return groups, reduce(add, self.ranks.each(work))

    def _tally(self, groups: Sequence[Group]) -> Tally:
        return Tally.of(groups, size=self.settings.num_generations, cheats=self.task.cheats)

    def _score(self, text: str, problem: Problem, style: str, truncated: bool, length: int) -> Score:
        """The task's score minus the length penalty of `length` tokens."""
        score, reward = self.task.score(text, problem, style=style, truncated=truncated), self.reward
        if not reward.length_penalty:
            return score
        limits = {"soft_limit": reward.soft_limit, "max_new_tokens": self.settings.max_new_tokens}
        penalty = reward.length_penalty * overlong_penalty(length, **limits)
        return replace(score, reward=score.reward - penalty, parts={**score.parts, "length": -penalty})

    def _sample(self, step: int, places: list[int], turn: int, clock: Clock, meter: Meter) -> list[Group]:
        settings, size = self.settings, self.settings.num_generations
        prompts = self.curriculum.prompts(step, turn=turn)
        drawn = [prompts[place] for place in places]
        policy = self.engine.policy
        encoded = [policy.encode(self.task.prompt(problem, style)) for problem, style in drawn]
        with clock.phase("rollout"):
            rollout = self.engine.sample(
                encoded,
                SamplingParams.training(settings),
                uniform=uniforms(
                    settings.seed,
                    step,
                    [turn * settings.batch_size + place for place in places],
                    size,
                    settings.max_new_tokens,
                ),
                fit=self.fit,
                on_token=self.on_token,
            )
        meter.sampled(encoded, rollout)
        clock.add(rollout.seconds)
        groups = []
        with clock.phase("score"):
            for index, (place, (problem, style)) in enumerate(zip(places, drawn, strict=True)):
                rows = slice(index * size, (index + 1) * size)
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
                        place, problem, style, encoded[index], completions, logprobs, truncated, texts, scores, rewards
                    )
                )
        return groups
