"""What samples completions: the interface that training, evaluation and `solve` know."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.params import SamplingParams


class EngineLost(CountdownError):
    """The engine is another program, and has ended, hangs or replies nonsense; the last step can be saved."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint, exit_code=1)


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch; row p * G + g is completion g of prompt p."""

    completions: list[list[int]]  # token ids, including the end-of-sequence token if there is one
    logprobs: list[list[float]]  # per token, under the sampling distribution
    truncated: list[bool]  # reached the token limit
    seconds: dict[str, float] = field(compare=False)  # by phase: prefill, decode
    computed: int = field(compare=False)  # token positions computed by the model, including padding


class Engine(Protocol):
    """Samples with the weights of a policy."""

    @property
    def policy(self) -> Policy:
        """The policy, whose tokenizer encodes prompts and decodes completions."""

    def update_weights(self) -> None:
        """Hand over the policy's weights if they have changed and the engine has a copy; all ranks call it together."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        uniform: Tensor | None,
        micro_batch: MicroBatch | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Rollout:
        """Sample completions of each prompt, greedily if `uniform` (P, G, T) is None.

        `micro_batch` limits how many are decoded at once. `on_token` receives the length of the unfinished rows after
        each token; an exception it raises ends the rollout.
        """

    def stream(self, prompt: list[int], params: SamplingParams, *, uniform: Tensor | None) -> Iterator[str]:
        """Yield the text of one completion as it is sampled; `uniform` (1, 1, T) as in `sample`."""


def uniforms(seed: int, step: int, prompts: Sequence[int], num_generations: int, tokens: int) -> Tensor:
    """Uniform numbers (P, G, T) in [0, 1) from a hash of (seed, step, prompt, sample), 53 bits each.

    torch.Generator uses only 32 bits of a seed, so rows of a long training would coincide.
    """
    rows = []
    for prompt in prompts:
        for sample in range(num_generations):
            bits = hashlib.shake_256(f"{seed}/{step}/{prompt}/{sample}".encode()).digest(8 * tokens)
            integers = torch.frombuffer(bytearray(bits), dtype=torch.int64) & (2**53 - 1)
            rows.append(integers.double() / 2**53)
    stacked = torch.stack(rows) if rows else torch.empty(0)
    return stacked.view(len(prompts), num_generations, tokens)
