"""Decode a batch token by token.

Two samplers with one interface: `ShrinkingSampler` drops finished rows, which saves most time on a CPU; `StaticSampler`
keeps every tensor in place, so a GPU can replay a captured step: launching its thousand kernels one by one takes about
twenty times as long as computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo_cli.core.model.attention import Decode, Prefill, StaticDecode, attention_dtype, sum_dtype
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.params import SamplingParams

DROP_BELOW = 0.95  # finished rows are dropped once live ones fit in this share of the batch
CHECK_EVERY = 8  # steps between checks whether all rows have finished; each check synchronizes a GPU
ROUNDED = 32  # static prompt lengths are multiples of this, to need few shapes
BLOCK = 128  # block size for sampling from a vocabulary of at least LARGE; divides Qwen's
LARGE = 8192
KEPT = 2  # static samplers kept: training and evaluation


def choose(logits: Tensor, uniform: Tensor | None, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Next tokens (B,) and their log-probabilities (B,) from logits (B, V): inverse-CDF sampling, or greedy choice.

    With `uniform` u, the token is the first whose cumulative probability exceeds u. Without, it is the most likely
    token, at any temperature.
    """
    if uniform is None:
        logprobs = logits.float().log_softmax(dim=-1)
        tokens = logits.argmax(dim=-1)
    else:
        logprobs = (logits.float() / params.temperature).log_softmax(dim=-1)
        tokens = _inverse_cdf(logprobs.exp(), uniform)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first tokens (B,) whose cumulative probabilities, of (B, V), exceed `uniform` (B,) times the row's sum.

    Sums have the dtype of `uniform`. A large vocabulary is searched by sums of blocks, then within one block: a scan of
    152,000 float64 numbers per row is slow on a GPU.
    """
    (rows, vocabulary), dtype = probabilities.shape, uniform.dtype
    if vocabulary < LARGE:
        total = probabilities.sum(dim=-1, keepdim=True, dtype=dtype)
        return _first_above(probabilities, uniform[:, None] * total)[:, 0]
    blocks = pad(probabilities, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)  # (B, N, S)
    sums = blocks.sum(dim=-1, dtype=dtype)  # (B, N)
    aim = uniform[:, None] * sums.sum(dim=-1, keepdim=True)
    block = _first_above(sums, aim)  # (B, 1)
    before = (sums.cumsum(dim=-1) - sums).gather(1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]  # (B, S)
    return (block * BLOCK + _first_above(within, aim - before))[:, 0]


def _first_above(weights: Tensor, aim: Tensor) -> Tensor:
    """The first index (B, 1) whose cumulative weight, of (B, N), exceeds `aim` (B, 1).

    Where rounding of the sums leads to a weight of 0, the largest weight's index instead.
    """
    places = torch.searchsorted(weights.cumsum(dim=-1, dtype=aim.dtype), aim, right=True)
    places = places.clamp(max=weights.shape[-1] - 1)
    return torch.where(weights.gather(-1, places) > 0, places, weights.argmax(dim=-1, keepdim=True))


def packed(policy: Policy) -> PackedPath:
    """The path of a policy that decodes with shared prompts."""
    assert isinstance(policy.path, PackedPath)
    return policy.path


class Sampler:
    """Completions being sampled; row p * G + g is completion g of prompt p."""

    def __init__(self, policy: Policy, rows: int, params: SamplingParams, uniform: Tensor | None) -> None:
        device, max_new_tokens = policy.device, params.max_new_tokens
        self.policy, self.params, self.limit = policy, params, max_new_tokens
        self.uniform = None if uniform is None else uniform.view(rows, -1).to(device, sum_dtype(device))  # (B, T)
        self.ends = torch.tensor(policy.end_ids, device=device)
        self.tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, max_new_tokens, device=device)
        self.ended = torch.zeros(rows, dtype=torch.long, device=device)  # length of a finished row, else 0
        self.rows = rows
        self.computed = 0  # token positions computed by the model

    def run(self) -> Iterator[int]:
        """Sample until every row has finished; yields the number of tokens of the unfinished rows."""
        raise NotImplementedError

    def _prefilled(self, prompts: Sequence[list[int]]) -> tuple[Prefill, Tensor, Tensor]:
        """Prefill of the prompts, their lengths (P,), and the logits (P, V) of their first new tokens."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.policy.device)
        prefill, logits, self.computed = packed(self.policy).prefill(self.policy, prompts)
        return prefill, lengths, logits


class ShrinkingSampler(Sampler):
    """A rectangle of P' prompts by G' slots of unfinished rows; `ids` maps slots to rows, -1 for none."""

    def __init__(
        self, policy: Policy, prompts: Sequence[list[int]], params: SamplingParams, uniform: Tensor | None
    ) -> None:
        num_generations, max_new_tokens = params.num_generations, params.max_new_tokens
        rows = len(prompts) * num_generations
        super().__init__(policy, rows, params, uniform)
        prefill, self.lengths, logits = self._prefilled(prompts)
        self.logits = logits.repeat_interleave(num_generations, dim=0)  # (P * G, V)
        self.cache = Decode(prefill, self.lengths, num_generations=num_generations, max_new_tokens=max_new_tokens)
        self.step = packed(policy).step(policy, max(map(len, prompts)) + max_new_tokens)
        self.ids = torch.arange(rows, device=policy.device).view(len(prompts), num_generations)

    def run(self) -> Iterator[int]:
        for time in range(self.limit):
            live = self.ids.flatten() >= 0
            uniform = None if self.uniform is None else self.uniform[self.ids.flatten().clamp(min=0), time]
            chosen, logprobs = choose(self.logits, uniform, self.params)
            rows = self.ids.flatten()[live]
            self.tokens[rows, time], self.logprobs[rows, time] = chosen[live], logprobs[live]
            finished = live & torch.isin(chosen, self.ends)
            self.ended[self.ids.flatten()[finished]] = time + 1
            self.ids = self.ids.masked_fill(finished.view_as(self.ids), -1)
            yield time + 1
            if time + 1 == self.limit or not bool((self.ids >= 0).any()):
                break
            self._advance(self._drop(chosen.view_as(self.ids)))

    def _drop(self, chosen: Tensor) -> Tensor:
        """Shrink the rectangle once enough rows have finished; returns the tokens (P', G') of the remaining rows."""
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


class StaticSampler(Sampler):
    """Preallocated tensors for batches of up to P prompts of L tokens, loaded by `start`, and a step to be captured.

    Stays valid while the model's weights are updated in place.
    """

    def __init__(self, policy: Policy, shape: tuple[int, int], params: SamplingParams) -> None:
        """`shape` (P, L)."""
        num_generations, max_new_tokens = params.num_generations, params.max_new_tokens
        (prompts, longest), device, model = shape, policy.device, policy.model
        rows = prompts * num_generations
        uniform = None if params.greedy else torch.zeros(rows, max_new_tokens, dtype=sum_dtype(device))
        super().__init__(policy, rows, params, uniform)
        self.shape = shape
        self.step = packed(policy).step(policy, longest + max_new_tokens, in_place=True)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # prompt length of each row
        self.time = torch.zeros(1, dtype=torch.long, device=device)  # index of the token to sample
        self.logits = torch.zeros(rows, model.config.vocab_size, dtype=model.dtype, device=device)
        heads, width = model.config.num_key_value_heads, model.get_decoder().layers[0].self_attn.head_dim
        self.cache = StaticDecode(
            model.config.num_hidden_layers,
            (prompts, heads, num_generations, max_new_tokens, width),
            longest=longest,
            dtype=attention_dtype(device, model.dtype),
            device=device,
        )
        self.replay: Callable[[], None] | None = None

    def start(self, prompts: Sequence[list[int]], uniform: Tensor | None) -> None:
        """Prefill a batch; its first prompt stands in for missing ones, which count as finished."""
        missing = self.shape[0] - len(prompts)
        prefill, lengths, logits = self._prefilled([*prompts, *[prompts[0]] * missing])
        self.cache.fill(prefill, lengths)
        self.lengths.copy_(lengths.repeat_interleave(self.params.num_generations))
        self.logits.copy_(logits.repeat_interleave(self.params.num_generations, dim=0))
        self.rows = len(prompts) * self.params.num_generations
        self.ended.zero_()
        self.ended[self.rows :] = 1
        if self.uniform is not None and uniform is not None:
            self.uniform[: self.rows].copy_(uniform.view(self.rows, -1))

    def run(self) -> Iterator[int]:
        self.time.zero_()
        self._pick()
        yield 1
        for time in range(1, self.limit):
            if time % CHECK_EVERY == 0 and bool((self.ended > 0).all()):
                break
            self.time.fill_(time)
            if self.replay is None:
                self.replay = record(self._turn, self.policy.device)
            self.replay()
            self.computed += len(self.tokens)
            yield time + 1

    def _turn(self) -> None:
        """Feed in the previous token and sample token number `time` of every row. Idempotent."""
        before = self.time - 1
        self.cache.open(before)
        tokens = self.tokens.index_select(1, before)[:, 0]
        self.logits.copy_(self.step(tokens, self.lengths + before, self.cache))
        self._pick()

    def _pick(self) -> None:
        uniform = None if self.uniform is None else self.uniform.index_select(1, self.time)[:, 0]
        chosen, logprobs = choose(self.logits, uniform, self.params)
        self.tokens.index_copy_(1, self.time, chosen[:, None])
        self.logprobs.index_copy_(1, self.time, logprobs[:, None])
        finished = (self.ended == 0) & (chosen[:, None] == self.ends).any(dim=1)
        self.ended.copy_(torch.where(finished, self.time + 1, self.ended))


def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that repeats `work` on the same tensors: on CUDA, a captured graph that is replayed.

    `work` runs a few times during capture. It must not read tensor values on the host, nor create tensors that outlive
    it.
    """
    if device.type != "cuda":
        return work
    aside = _side_stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # warm-up: library initialization cannot be captured
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # torch leaves the side stream current where a capture fails; the outer context does not.
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph, stream=aside):
        work()
    return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace per stream."""
    return torch.cuda.Stream(device)


def static_sampler(
    kept: dict[SamplingParams, StaticSampler],
    policy: Policy,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    uniform: Tensor | None,
) -> StaticSampler:
    """A static sampler of the policy with a batch loaded: the one of `kept` with these parameters, or a larger one."""
    params = params if uniform is not None else replace(params, temperature=0.0)
    count, longest = len(prompts), -(-max(map(len, prompts)) // ROUNDED) * ROUNDED
    most, most_tokens = kept[params].shape if params in kept else (0, 0)
    if count > most or longest > most_tokens:
        # Evict first, to free memory. Training's sampler has the largest groups and is kept during evaluations.
        kept.pop(params, None)
        while len(kept) >= KEPT:
            del kept[min(kept, key=lambda one: one.num_generations)]
        kept[params] = StaticSampler(policy, (max(count, most), max(longest, most_tokens)), params)
    kept[params].start(prompts, uniform)
    return kept[params]
