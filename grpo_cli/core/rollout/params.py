"""Sampling parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Eval, Train


@dataclass(frozen=True)
class SamplingParams:
    """`num_generations` completions per prompt, of at most `max_new_tokens`; greedy at temperature 0."""

    max_new_tokens: int
    temperature: float = 1.0
    num_generations: int = 1

    @classmethod
    def training(cls, train: Train) -> SamplingParams:
        return cls(train.max_new_tokens, train.temperature, train.num_generations)

    @classmethod
    def evaluation(cls, settings: Eval) -> SamplingParams:
        return cls(settings.max_new_tokens, settings.temperature, settings.samples)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
