"""Sampling a group of completions per prompt.

Each prompt is prefilled once and its keys are shared by its G completions; rows that have ended are dropped. Every
random number is a function of (seed, step, prompt, sample) and the position alone, so a split into batches never
changes what is sampled. It does not know puzzles, rewards, or any decoding trick: no top-k, no top-p, no penalties,
for any model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from grpo_cli.core.attention import Decode, Prefill
from grpo_cli.core.memory import Fit
from grpo_cli.core.policy import Policy

DROP_BELOW = 0.8  # finished rows are dropped once the live ones fit in this share of the batch


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch, row p * G + g being completion g of prompt p."""

    completions: list[list[int]]  # token ids, the end-of-sequence token included where there is one
    logprobs: list[list[float]]  # of each token, under the distribution that it was sampled from
    truncated: list[bool]  # ran out of tokens before its end-of-sequence token
    seconds: dict[str, float] = field(compare=False)  # by phase: prefill, decode
    computed: int = field(compare=False)  # token places of the passes through the model, padding included


def draws(seed: int, step: int, prompts: Sequence[int], num_generations: int, tokens: int) -> Tensor:
    """Uniform numbers (P, G, T) in [0, 1); each row depends on seed, step, the prompt's index and the sample's."""
    generator = torch.Generator()
    rows = []
    for prompt in prompts:
        for sample in range(num_generations):
            digest = hashlib.blake2b(f"{seed}/{step}/{prompt}/{sample}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            rows.append(torch.rand(tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows).view(len(prompts), num_generations, tokens)


def choose(logits: Tensor, uniform: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Next tokens (B,) and their log-probabilities (B,) from logits (B, V): inverse-CDF sampling, or greedy choice.

    With `uniform` u the token is the first whose cumulative probability exceeds u. Without, the most
    likely token is taken, and temperature plays no part.
    """
    if uniform is None:
        logprobs = logits.float().log_softmax(dim=-1)
        tokens = logits.argmax(dim=-1)
    else:
        logprobs = (logits.float() / temperature).log_softmax(dim=-1)
        cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)  # (B, V)
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


@torch.inference_mode()
def sample(
    policy: Policy,
    prompts: Sequence[list[int]],
    *,
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    uniform: Tensor | None,
    fit: Fit | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample `num_generations` completions of each prompt, greedily if `uniform` (P, G, T) is None.

    `fit` says how many at once; by default all, or as many as memory allows. `on_token` is told after each token of the
    rows still going on how many tokens they have; what it raises ends the rollout.
    """

    def part(chosen: slice, generations: slice) -> Rollout:
        count = len(range(num_generations)[generations])
        drawn = None if uniform is None else uniform[chosen, generations]
        start = _now(policy)
        sampler = _Sampler(policy, prompts[chosen], count, max_new_tokens, temperature, drawn)
        prefilled = _now(policy)
        for time, _ in enumerate(sampler.run()):
            if on_token is not None:
                on_token(time + 1)
        return sampler.result({"prefill": prefilled - start, "decode": _now(policy) - prefilled})

    def everything(at_once: int) -> Rollout:
        with policy.autocast():
            return _joined([part(*slices) for slices in _parts(len(prompts), num_generations, at_once)])

    return (fit or Fit()).attempt(everything, total=len(prompts) * num_generations, doing="rollout")


@torch.inference_mode()
def stream(
    policy: Policy, prompt: list[int], *, max_new_tokens: int, temperature: float, uniform: Tensor | None
) -> Iterator[str]:
    """The text of one completion, piece by piece as it is sampled; `uniform` (1, 1, T) as in `sample`."""
    tokens: list[int] = []
    shown = ""
    with policy.autocast():
        for chosen in _Sampler(policy, [prompt], 1, max_new_tokens, temperature, uniform).run():
            tokens += chosen.tolist()
            text = policy.decode(tokens)
            if not text.endswith("\ufffd"):  # a character whose bytes are not complete yet
                yield text[len(shown) :]
                shown = text
    yield policy.decode(tokens)[len(shown) :]


def _now(policy: Policy) -> float:
    """Seconds, once the device has done what it was given."""
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return perf_counter()


def _parts(prompts: int, generations: int, rows: int) -> list[tuple[slice, slice]]:
    """P prompts by G generations cut into rectangles of at most `rows` completions, in order; one if `rows` is 0."""
    rows = rows or prompts * generations
    tall, wide = max(1, rows // generations), min(rows, generations)
    return [
        (slice(top, top + tall), slice(left, left + wide))
        for top in range(0, prompts, tall)
        for left in range(0, generations, wide)
    ]


def _joined(parts: Sequence[Rollout]) -> Rollout:
    return Rollout(
        [tokens for part in parts for tokens in part.completions],
        [logprobs for part in parts for logprobs in part.logprobs],
        [cut for part in parts for cut in part.truncated],
        {phase: sum(part.seconds[phase] for part in parts) for phase in parts[0].seconds},
        sum(part.computed for part in parts),
    )


class _Sampler:
    """The rows in flight: a rectangle of P' prompts by G' slots; `ids` says which row each slot is, -1 for none."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        uniform: Tensor | None,
    ) -> None:
        self.policy, self.temperature, self.limit = policy, temperature, max_new_tokens
        device = policy.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(lengths.max())
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)  # (P, L)
        self.computed = tokens.numel()
        prefill = Prefill()
        hidden = policy.hidden(tokens, torch.arange(longest, device=device).expand_as(tokens), prefill)
        last = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # (P, D)
        self.logits = policy.logits(last).repeat_interleave(num_generations, dim=0)  # (P * G, V)
        self.cache = Decode(prefill, lengths, num_generations=num_generations, max_new_tokens=max_new_tokens)
        self.lengths = lengths
        self.step = policy.step(longest + max_new_tokens)
        rows = len(prompts) * num_generations
        self.ids = torch.arange(rows, device=device).view(len(prompts), num_generations)
        self.uniform = None if uniform is None else uniform.to(device).view(rows, -1)
        self.ends = torch.tensor(policy.end_ids, device=device)
        self.tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, max_new_tokens, device=device)
        self.ended = torch.full((rows,), 0, device=device)  # length at which a row ended, 0 while it goes on

    def run(self) -> Iterator[Tensor]:
        """Sample until every row has ended or is full; yields the tokens of the live rows, one for each."""
        for time in range(self.limit):
            live = self.ids.flatten() >= 0
            uniform = None if self.uniform is None else self.uniform[self.ids.flatten().clamp(min=0), time]
            chosen, logprobs = choose(self.logits, uniform, self.temperature)
            rows = self.ids.flatten()[live]
            self.tokens[rows, time], self.logprobs[rows, time] = chosen[live], logprobs[live]
            finished = live & torch.isin(chosen, self.ends)
            self.ended[self.ids.flatten()[finished]] = time + 1
            self.ids = self.ids.masked_fill(finished.view_as(self.ids), -1)
            yield chosen[live]
            if time + 1 == self.limit or not bool((self.ids >= 0).any()):
                break
            self._advance(self._drop(chosen.view_as(self.ids)))

    def _drop(self, chosen: Tensor) -> Tensor:
        """Shrink the rectangle once enough rows have ended; returns the tokens (P', G') of the rows that stay."""
        live = self.ids >= 0
        prompts = live.any(dim=1).nonzero()[:, 0]
        width = int(live.sum(dim=1).max())
        if len(prompts) * width > DROP_BELOW * live.numel():
            return chosen
        slots = live[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :width]  # live rows first
        self.cache.keep(prompts, slots)
        self.lengths = self.lengths[prompts]
        self.ids = self.ids[prompts].gather(1, slots)
        return chosen[prompts].gather(1, slots)

    def _advance(self, chosen: Tensor) -> None:
        positions = (self.lengths + self.cache.time)[:, None].expand_as(chosen)
        self.logits = self.step(chosen.flatten(), positions.flatten(), self.cache)
        self.cache.time += 1
        self.computed += chosen.numel()

    def result(self, seconds: dict[str, float]) -> Rollout:
        truncated = (self.ended == 0).tolist()
        lengths = [self.limit if cut else end for cut, end in zip(truncated, self.ended.tolist(), strict=True)]
        rows = zip(self.tokens.tolist(), self.logprobs.tolist(), lengths, strict=True)
        cut = [(tokens[:length], logprobs[:length]) for tokens, logprobs, length in rows]
        return Rollout(
            [tokens for tokens, _ in cut], [logprobs for _, logprobs in cut], truncated, seconds, self.computed
        )
