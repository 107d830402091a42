"""Sample a group of completions per prompt.

Each prompt is prefilled once and its keys are shared by its G completions. Every random number is a function of (seed,
step, prompt, sample) and the position, so the split into batches does not change the samples. No top-k, top-p or
penalties, for any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import require_context
from grpo_cli.core.model.packed import can_step_in_place
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.decode import Sampler, ShrinkingSampler, StaticSampler, static_sampler
from grpo_cli.core.rollout.engine import Rollout
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.plain_sampler import PlainSampler


@dataclass(frozen=True)
class LocalEngine:
    """Samples with a policy. Its static samplers serve later rollouts too, while the weights are updated in place."""

    policy: Policy
    samplers: dict[SamplingParams, StaticSampler] = field(default_factory=dict)
    static: bool | None = None  # whether to decode in place; None: on CUDA

    def update_weights(self) -> None:
        """Does nothing: it samples with the policy itself."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        uniform: Tensor | None,
        micro_batch: MicroBatch | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Rollout:
        """As `Engine.sample`."""
        if not prompts:
            return Rollout([], [], [], {}, 0)
        micro_batch, size = micro_batch or MicroBatch(), params.num_generations
        with torch.inference_mode(), self.policy.autocast():
            for attempt in micro_batch.attempts(len(prompts) * size, "rollout"):
                with attempt, self._freeing():
                    parts = [
                        self._part(
                            prompts[some],
                            replace(params, num_generations=len(range(size)[generations])),
                            None if uniform is None else uniform[some, generations],
                            micro_batch,
                            on_token,
                        )
                        for some, generations in _parts(len(prompts), size, micro_batch.rows)
                    ]
        return _joined(parts)

    @contextmanager
    def _freeing(self) -> Iterator[None]:
        """Free the memory of the static samplers if the block fails."""
        try:
            yield
        except BaseException:
            self.samplers.clear()
            raise

    def _part(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        uniform: Tensor | None,
        micro_batch: MicroBatch,
        on_token: Callable[[int], None] | None,
    ) -> Rollout:
        start = _now(self.policy)
        sampler = self._sampler(prompts, params, uniform)
        prefilled = _now(self.policy)
        for time in sampler.run():
            micro_batch.check()
            if on_token is not None:
                on_token(time)
        return _rollout(sampler, {"prefill": prefilled - start, "decode": _now(self.policy) - prefilled})

    @torch.inference_mode()
    def stream(self, prompt: list[int], params: SamplingParams, *, uniform: Tensor | None) -> Iterator[str]:
        """Yield the text of one completion as it is sampled; `uniform` (1, 1, T) as in `sample`."""
        shown = ""
        with self.policy.autocast():
            sampler = self._sampler([prompt], params, uniform)
            for time in sampler.run():
                tokens = sampler.tokens[0, : int(sampler.ended[0]) or time].tolist()
                text = self.policy.decode(tokens)
                if not text.endswith("\ufffd"):  # incomplete character
                    yield text[len(shown) :]
                    shown = text
        yield self.policy.decode(tokens)[len(shown) :]

    def _sampler(self, prompts: Sequence[list[int]], params: SamplingParams, uniform: Tensor | None) -> Sampler:
        """A sampler with the prompts prefilled. Raises CountdownError beyond the model's context."""
        policy = self.policy
        require_context(policy.name, policy.model.config, max(map(len, prompts)) + params.max_new_tokens)
        if isinstance(policy.path, PlainPath):
            return PlainSampler(policy, prompts, params, uniform)
        in_place = policy.device.type == "cuda" and can_step_in_place(policy)
        if in_place if self.static is None else self.static:
            return static_sampler(self.samplers, policy, prompts, params, uniform)
        return ShrinkingSampler(policy, prompts, params, uniform)


def _now(policy: Policy) -> float:
    """Time in seconds, after the device has finished its work."""
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return perf_counter()


def _parts(prompts: int, generations: int, rows: int) -> list[tuple[slice, slice]]:
    """Cut P prompts by G generations into rectangles of at most `rows` completions, in order; one if `rows` is 0."""
    rows = rows or prompts * generations
    tall, wide = max(1, rows // generations), min(rows, generations)
    return [
        (slice(top, top + tall), slice(left, left + wide))
        for top in range(0, prompts, tall)
        for left in range(0, generations, wide)
    ]


def _rollout(sampler: Sampler, seconds: dict[str, float]) -> Rollout:
    ended = sampler.ended[: sampler.rows].tolist()
    lengths = [end or sampler.limit for end in ended]
    rows = zip(sampler.tokens.tolist(), sampler.logprobs.tolist(), lengths, strict=False)
    cut = [(tokens[:length], logprobs[:length]) for tokens, logprobs, length in rows]
    return Rollout(
        [tokens for tokens, _ in cut],
        [logprobs for _, logprobs in cut],
        [end == 0 for end in ended],
        seconds,
        sampler.computed,
    )


def _joined(parts: Sequence[Rollout]) -> Rollout:
    return Rollout(
        [tokens for part in parts for tokens in part.completions],
        [logprobs for part in parts for logprobs in part.logprobs],
        [cut for part in parts for cut in part.truncated],
        {phase: sum(part.seconds[phase] for part in parts) for phase in parts[0].seconds},
        sum(part.computed for part in parts),
    )
