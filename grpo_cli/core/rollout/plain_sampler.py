"""Decoding with the model's own forward and cache: slower, and correct for any causal model.

Every completion is a row of its own. Only prompts of equal length share a batch, so there is no padding and no model
needs a mask or positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature

import torch
from torch import Tensor

from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.decode import Sampler, choose
from grpo_cli.core.rollout.params import SamplingParams

CACHES = ("cache", "past_key_values", "cache_params", "state")  # argument names of the cache by architecture


class PlainSampler(Sampler):
    """Rows in groups of prompts of equal length."""

    def __init__(
        self, policy: Policy, prompts: Sequence[list[int]], params: SamplingParams, uniform: Tensor | None
    ) -> None:
        assert isinstance(policy.path, PlainPath)
        self.cached = policy.path.cached
        self.takes = signature(policy.model.forward).parameters
        super().__init__(policy, len(prompts) * params.num_generations, params, uniform)
        self.prompts = [prompt for prompt in prompts for _ in range(params.num_generations)]

    def run(self) -> Iterator[int]:
        for length in sorted({len(prompt) for prompt in self.prompts}):
            rows = [row for row, prompt in enumerate(self.prompts) if len(prompt) == length]
            yield from self._decode(torch.tensor(rows, device=self.policy.device))

    def _decode(self, rows: Tensor) -> Iterator[int]:
        tokens = torch.tensor([self.prompts[row] for row in rows.tolist()], device=self.policy.device)  # (B, L)
        fed, cache = tokens, dict[str, object]()
        last = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        for time in range(self.limit):
            output = self.policy.model(input_ids=fed, use_cache=self.cached, **cache, **last)
            self.computed += fed.numel()
            uniform = None if self.uniform is None else self.uniform[rows, time]
            chosen, logprobs = choose(output.logits[:, -1], uniform, self.params)
            self.tokens[rows, time], self.logprobs[rows, time] = chosen, logprobs
            finished = torch.isin(chosen, self.ends) & (self.ended[rows] == 0)
            self.ended[rows[finished]] = time + 1
            yield time + 1
            if bool((self.ended[rows] > 0).all()):
                break
            cache = self._cache_of(output) if self.cached else {}
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            fed = chosen[:, None] if cache else tokens

    def _cache_of(self, output: Mapping[str, object]) -> dict[str, object]:
        """The model's cache under the argument name of its forward; later versions of transformers use `cache`."""
        name = next((name for name in CACHES if output.get(name) is not None), None)
        return {} if name is None else {"cache" if "cache" in self.takes else name: output[name]}
