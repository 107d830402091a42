"""Attention that computes a prompt once for its whole group of completions.

The G completions of a prompt all attend to the same prompt keys, and the prompt never attends to them, so its part of
every layer is computed once, exactly, in sampling and in training. So are the first S tokens, which all prompts of a
batch share: the system's turn and the worked example. Each pass through the model carries a plan of who attends to
whom; `shared_prefix_attention` passes it each layer's queries, keys and values.

Shapes: P prompts of at most L tokens after the S shared ones, G completions each, R rows (completions) of at most C
tokens, N packed tokens; H query heads, K key-value heads, d the head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

BUCKET = 16  # completions of similar length that attend together in training; limits padding
GROUP = 4  # completions of a prompt from which its keys are read often enough; sharing costs more than it saves
WORTH = 4  # tokens that prompts must share to be computed once; the prompts of the self-check share seven


class Plan(Protocol):
    """Who attends to whom in one pass through the model."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Queries (B, H, T, d), keys and values (B, K, T, d) of one layer -> attended values (B, T, H, d)."""
        ...


def attention_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of attention if the rest computes in `dtype`.

    On a CPU it is float32: the backward pass of its bfloat16 kernels is two to three times slower.
    """
    return torch.float32 if device.type == "cpu" else dtype


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of exact sums: float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def maskless(device: torch.device) -> bool:
    """Whether completions attend without a mask in memory; flash attention on CUDA does not support one."""
    return device.type == "cuda"


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Run each operation in the dtype of its inputs."""
    return torch.autocast(device.type, enabled=False)


def num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """S: first tokens that all prompts share, 0 if they are few. Each prompt has at least one more."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    shared = next((at for at in range(most) if any(prompt[at] != prompts[0][at] for prompt in prompts)), most)
    return shared if shared >= WORTH else 0


def order(lengths: Sequence[int], prompt_index: Sequence[int], device: torch.device) -> list[int]:
    """Order of completions for `Packed`: similar lengths, or the same prompt, together."""
    apart = maskless(device)
    return sorted(range(len(lengths)), key=lambda row: (prompt_index[row] if apart else 0, lengths[row]))


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: Plan,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer; `plan` reaches it through the model's own call."""
    layer = module.layer_idx
    assert isinstance(layer, int) and attention_mask is None
    dtype = attention_dtype(query.device, value.dtype)
    with no_autocast(query.device):
        attended = plan.attend(layer, query.to(dtype), key.to(dtype), value.to(dtype), scaling)
    return attended.to(value.dtype), None


class Prefill:
    """Prompts (P, L), padded on the right, after the `shared` tokens; stores their keys and values for `Decode`."""

    def __init__(self, shared: Prefill | None = None) -> None:
        self.shared = shared  # the prefill of the tokens (1, S) that all prompts share, without these
        self.keys: list[Tensor] = []  # per layer (P, K, L, d)
        self.values: list[Tensor] = []
        self.bias: Tensor | CausalBias | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.keys.append(key)
        self.values.append(value)
        keys, values = self.whole(layer)
        if self.bias is None:
            self.bias = _lower_right(key.shape[2], keys.shape[2], key.device)
        return _attended(query, keys, values, self.bias, scaling).transpose(1, 2)

    def whole(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K, S + L, d) of a layer, those of the shared tokens repeated."""
        if self.shared is None:
            return self.keys[layer], self.values[layer]
        parts = ((self.shared.keys, self.keys), (self.shared.values, self.values))
        keys, values = (_behind(shared[layer], own[layer]) for shared, own in parts)
        return keys, values


class Decode:
    """One new token for each of P * G completions, which share their prompt's keys and have their own after it."""

    def __init__(self, prefill: Prefill, lengths: Tensor, *, num_generations: int, max_new_tokens: int) -> None:
        """`lengths` (P,): real tokens of each prompt; padding beyond is never attended to."""
        shared = prefill.shared if num_generations < GROUP else None
        self.shared = [
            (key[0].mT.contiguous(), value[0].contiguous())  # per layer (K, d, S), (K, S, d)
            for key, value in (zip(shared.keys, shared.values, strict=True) if shared else ())
        ]
        layers = range(len(prefill.keys))
        pairs = [(prefill.keys[at], prefill.values[at]) if shared else prefill.whole(at) for at in layers]
        self.prompt_keys = [key.mT.contiguous() for key, _ in pairs]  # per layer (P, K, d, L)
        self.prompt_values = [value.contiguous() for _, value in pairs]  # per layer (P, K, L, d)
        prompts, heads, longest, width = self.prompt_values[0].shape
        before = self.shared[0][1].shape[1] if self.shared else 0
        absent = before + torch.arange(longest, device=lengths.device) >= lengths[:, None]  # (P, L)
        self.absent = absent[:, None, :] if bool(absent.any()) else None
        shape = (prompts, heads, num_generations, max_new_tokens, width)
        self.own_keys = [key.new_empty(shape) for key, _ in pairs]  # per layer (P, K, G, C, d)
        self.own_values = [value.new_empty(shape) for _, value in pairs]
        self.time = 0  # tokens per completion so far

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        prompts, heads, _, width = self.prompt_values[layer].shape
        for cache, new in ((self.own_keys, key), (self.own_values, value)):
            cache[layer][:, :, :, self.time] = new.view(prompts, -1, heads, width).transpose(1, 2)
        keys, values = (cache[layer][:, :, :, : self.time + 1] for cache in (self.own_keys, self.own_values))
        shared = self.shared[layer] if self.shared else None
        prompt_keys, prompt_values = self.prompt_keys[layer], self.prompt_values[layer]
        return _decoded(query, prompt_keys, prompt_values, keys, values, self.absent, scaling, shared)

    def keep(self, prompts: Tensor, slots: Tensor) -> None:
        """Keep only these completions: `prompts` (P',), and for each of them the `slots` (P', G')."""
        self.absent = None if self.absent is None else self.absent[prompts]
        for cache in (self.prompt_keys, self.prompt_values):
            cache[:] = [tensor[prompts] for tensor in cache]
        for cache in (self.own_keys, self.own_values):
            cache[:] = [_pick(tensor, prompts, slots, self.time) for tensor in cache]


class StaticDecode:
    """Decode in preallocated buffers and without host values, so a CUDA graph can replay it.

    For P prompts of L tokens, with G completions of C tokens each. Call `fill` first, then `open` before each token.
    """

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int, int],
        *,
        longest: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` (P, K, G, C, d) of a layer's own keys."""
        prompts, heads, _, max_new_tokens, width = shape

        def cache(*shape: int) -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

        self.prompt_keys, self.prompt_values = (cache(prompts, heads, longest, width) for _ in range(2))
        self.own_keys, self.own_values = cache(*shape), cache(*shape)
        self.absent = torch.ones(prompts, 1, longest + max_new_tokens, dtype=torch.bool, device=device)
        self.lengths = torch.ones(prompts, dtype=torch.long, device=device)  # of the prompts
        self.slot = torch.zeros(1, dtype=torch.long, device=device)  # index of the new token's key

    def fill(self, prefill: Prefill, lengths: Tensor) -> None:
        """Load P prompts of `lengths` (P,), padded to any number of tokens up to L."""
        for layer, caches in enumerate(zip(self.prompt_keys, self.prompt_values, strict=True)):
            for cache, filled in zip(caches, prefill.whole(layer), strict=True):
                cache[:, :, : filled.shape[2]].copy_(filled)
        self.lengths.copy_(lengths)
        self.absent.copy_(torch.arange(self.absent.shape[2], device=lengths.device) >= lengths[:, None, None])

    def open(self, slot: Tensor) -> None:
        """Set the next token's index `slot` (1,) in its completion, from 0."""
        self.slot.copy_(slot)
        self.absent.index_fill_(2, self.prompt_values[0].shape[2] + slot, False)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        prompts, heads, _, width = self.prompt_values[layer].shape
        own = (self.own_keys[layer], self.own_values[layer])
        for cache, new in zip(own, (key, value), strict=True):
            cache.index_copy_(3, self.slot, new.view(prompts, -1, heads, 1, width).transpose(1, 2))
        return _decoded(query, self.prompt_keys[layer].mT, self.prompt_values[layer], *own, self.absent, scaling)

    def attend_fused(self, layer: int, heads: Tensor, cosines: Tensor, sines: Tensor, scaling: float) -> Tensor:
        """Rotate and attend in one kernel: heads (B, H + 2 K, d) before rotation -> attended values (B, H, d)."""
        from grpo_cli.core.model import kernels  # imports Triton

        prompts = (self.prompt_keys[layer], self.prompt_values[layer])
        own = (self.own_keys[layer], self.own_values[layer])
        return kernels.decode_attention(heads, cosines, sines, prompts, own, self.lengths, self.slot, scaling)


class Packed:
    """Training: prompts and completions of any length in one row [s | p1 | p2 | ... | c1 | c2 | ...], without padding.

    s are the S tokens that all prompts share, p1, p2, ... their rests. Completion r attends to s, to prompt
    `prompt_index[r]` and to itself. Positions restart after the prompt.
    Example: prompts of 3 and 2 tokens, completions of 2 and 1 with prompt_index [0, 1]: positions [0 1 2  0 1  3 4  2];
    if the first token is shared [0  1 2  1  3 4  2].
    At most `BUCKET` completions attend together, padded to the longest. Without a mask, they all belong to one prompt,
    so causal attention aligned at the last key gives each token its correct keys.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        lengths: Sequence[int],
        prompt_index: Sequence[int],
        device: torch.device,
        *,
        shared: int = 0,
    ) -> None:
        """`prompt_lengths`, of whole prompts; `shared` is S."""
        self.shared, rests = shared, [length - shared for length in prompt_lengths]
        self.prompts = _Rows(rests, device)
        reach = shared + self.prompts.shape[1]
        self.bias = _lower_right(self.prompts.shape[1], reach, device)
        self.buckets = []
        apart = maskless(device)
        for start, end in _cuts(prompt_index if apart else [0] * len(prompt_index)):
            rows, owner = _Rows(lengths[start:end], device), torch.tensor(prompt_index[start:end], device=device)
            longest, own_reach = rows.shape[1], prompt_lengths[prompt_index[start]] if apart else reach
            bias = causal_lower_right(longest, own_reach + longest) if apart else self._mask(longest, owner)
            self.buckets.append((rows, owner, own_reach, bias, prompt_index[start] if apart else None))
        self.sizes = [shared] * bool(shared) + [self.prompts.tokens, *(rows.tokens for rows, *_ in self.buckets)]
        ends = shared + torch.tensor([*rests, *lengths]).cumsum(0) - 1  # packed position of each section's last token
        firsts = ends[len(rests) - 1 : -1] + 1
        before = torch.arange(int(ends[len(rests) - 1]), int(ends[-1]))
        before[firsts - firsts[0]] = ends[torch.tensor(prompt_index)]
        self.predecessors = before.to(device)  # packed position that predicts each completion token
        positions = [torch.arange(shared), *(torch.arange(shared, length) for length in prompt_lengths)]
        positions += [torch.arange(n) + prompt_lengths[owner] for n, owner in zip(lengths, prompt_index, strict=True)]
        joined = torch.cat(positions)
        self.positions, self.longest = joined[None].to(device), int(joined.max()) + 1  # (1, N), positions in use

    def _mask(self, longest: int, owner: Tensor) -> Tensor:
        """(R, 1, C, S + L + C), 0 where a completion's token attends, to its prompt and its own so far, else -inf."""
        causal = torch.ones(longest, longest, dtype=torch.bool, device=owner.device).tril()
        to_shared = causal.new_ones(len(owner), longest, self.shared)
        to_prompt = self.prompts.real[owner][:, None, :].expand(-1, longest, -1)  # (R, C, L)
        attends = torch.cat([to_shared, to_prompt, causal.expand(len(owner), -1, -1)], dim=-1)[:, None]
        return torch.zeros(attends.shape, device=owner.device).masked_fill(~attends, float("-inf"))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        # Split first; otherwise each bucket's gradient has the size of the whole row.
        parts = zip(*(tensor[0].transpose(0, 1).split(self.sizes) for tensor in (query, key, value)), strict=True)
        attended = []
        shared = [part[None].transpose(1, 2) for part in next(parts)] if self.shared else None  # (1, H or K, S, d)
        queries, prompt_keys, prompt_values = (self.prompts.pad(part).transpose(1, 2) for part in next(parts))
        if shared is not None:
            attended.append(_attended(shared[0], shared[1], shared[2], None, scaling)[0].transpose(0, 1))
            prompt_keys, prompt_values = _behind(shared[1], prompt_keys), _behind(shared[2], prompt_values)
        of_prompts = _attended(queries, prompt_keys, prompt_values, self.bias, scaling)
        attended.append(self.prompts.unpad(of_prompts.transpose(1, 2)))
        for (rows, owner, reach, bias, alike), part in zip(self.buckets, parts, strict=True):
            queries, keys, values = (rows.pad(tensor).transpose(1, 2) for tensor in part)  # (R, H or K, C, d)
            keys = torch.cat([_of_owners(prompt_keys, owner, reach, alike), keys], dim=2)
            values = torch.cat([_of_owners(prompt_values, owner, reach, alike), values], dim=2)
            attended.append(rows.unpad(_attended(queries, keys, values, bias, scaling).transpose(1, 2)))
        return torch.cat(attended)[None]  # (1, N, H, d)


class _Rows:
    """Sequences of M tokens in total, concatenated, and the same as a padded matrix (R, C)."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.tokens = sum(lengths)
        self.shape = (len(lengths), max(lengths))
        real = torch.arange(self.shape[1]) < torch.tensor(lengths)[:, None]  # on the host, without a synchronization
        places = real.flatten().nonzero()[:, 0]
        self.real = real.to(device)
        self.places = places.to(device) if self.tokens < real.numel() else None  # (M,) position of each token

    def pad(self, flat: Tensor) -> Tensor:
        """(M, ...) -> (R, C, ...), with zeros for padding."""
        if self.places is not None:
            empty = flat.new_zeros((self.real.numel(), *flat.shape[1:]))
            flat = empty.index_copy(0, self.places, flat)
        return flat.reshape(*self.shape, *flat.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(R, C, ...) -> (M, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self.places is None else flat[self.places]


def _behind(shared: Tensor, own: Tensor) -> Tensor:
    """Keys or values (1, K, S, d) that all prompts share before those (P, K, L, d) of each: (P, K, S + L, d)."""
    return torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2)


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor | CausalBias | None:
    """The mask of causal attention aligned at the last of the keys; None if there are as many queries."""
    if queries == keys:
        return None
    if maskless(device):
        return causal_lower_right(queries, keys)
    return torch.full((queries, keys), float("-inf"), device=device).triu(keys - queries + 1)


def _of_owners(prompts: Tensor, owner: Tensor, reach: int, first: int | None) -> Tensor:
    """The first `reach` keys or values (R, K, reach, d) of each row's prompt; of prompt `first` if all rows share it.

    The gradient of a shared prompt is then one sum in a fixed order; an index would use atomics on a GPU.
    """
    if first is None:
        return prompts.index_select(0, owner)[:, :, :reach]
    return prompts[first : first + 1, :, :reach].expand(len(owner), -1, -1, -1)


def _pick(cache: Tensor, prompts: Tensor, slots: Tensor, time: int) -> Tensor:
    """Completions `slots` (P', G') of `prompts` (P',) of a cache (P, K, G, C, d) with `time` entries in use."""
    heads = torch.arange(cache.shape[1], device=cache.device)
    picked = cache.new_empty((len(prompts), cache.shape[1], slots.shape[1], *cache.shape[3:]))
    picked[:, :, :, :time] = cache[:, :, :, :time][prompts[:, None, None], heads[None, :, None], slots[:, None, :]]
    return picked


def _decoded(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    absent: Tensor | None,
    scaling: float,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one token of each of P * G completions to its prompt's keys and C of its own: (B, 1, H, d).

    `query` is (B, H, 1, d), the prompt's keys (P, K, d, L) and values (P, K, L, d), its own (P, K, G, C, d), those
    `shared` by all (K, d, S) and (K, S, d). `absent` (P, 1, L) or (P, 1, L + C) masks the first keys. Scores, scale and
    softmax are float32: Qwen's key biases push scores into the hundreds, where neighbouring bfloat16 values are 1 or 2
    apart.
    """
    prompts, heads, longest, width = prompt_values.shape
    grouped = (prompts, -1, heads, query.shape[1] // heads, width)
    keys, values = own_keys.flatten(0, 2), own_values.flatten(0, 2)  # (P * K * G, C, d)
    queries = query.view(grouped).transpose(1, 2).reshape(prompts * heads, -1, width)
    per_row, per_prompt = (len(keys), -1, width), (prompts, heads, queries.shape[1], -1)
    to_prompt = _scores(queries, prompt_keys.flatten(0, 1))  # (P * K, G * H/K, L)
    to_own = _scores(queries.reshape(per_row), keys.mT)  # (P * K * G, H/K, C)
    parts = [to_prompt.view(per_prompt), to_own.view(per_prompt)]
    if shared is not None:
        to_shared = _scores(_by_head(queries.view(per_prompt)), shared[0])  # (K, P * G * H/K, S)
        parts.append(to_shared.view(heads, prompts, *per_prompt[2:]).transpose(0, 1))
    scores = torch.cat(parts, dim=-1).mul_(scaling)  # (P, K, G * H/K, L + C + S)
    if absent is not None:
        by_prompt = scores.view(prompts, -1, scores.shape[-1])
        by_prompt[..., : absent.shape[-1]].masked_fill_(absent, float("-inf"))
    weights = scores.softmax(dim=-1).to(values.dtype)
    own_end = longest + keys.shape[1]
    attended = torch.bmm(weights[..., :longest].flatten(0, 1), prompt_values.flatten(0, 1)).view(per_row)
    attended = torch.baddbmm(attended, weights[..., longest:own_end].reshape(*to_own.shape), values)
    if shared is not None:
        of_shared = torch.bmm(_by_head(weights[..., own_end:]), shared[1]).view(heads, prompts, -1, width)
        attended = attended.view(prompts, heads, -1, width) + of_shared.transpose(0, 1)
    return attended.view(prompts, heads, -1, *grouped[3:]).transpose(1, 2).reshape(query.shape[0], 1, -1, width)


def _by_head(rows: Tensor) -> Tensor:
    """(P, K, M, d) -> (K, P * M, d)."""
    return rows.transpose(0, 1).flatten(1, 2)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products (B, M, N) of queries (B, M, d) and keys (B, d, N) in float32. On CUDA the inputs stay in 16 bits."""
    if queries.is_cuda and queries.dtype != torch.float32:
        return torch.bmm(queries, keys, out_dtype=torch.float32)
    return torch.bmm(queries.float(), keys.float())


def _attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | CausalBias | None, scaling: float) -> Tensor:
    """Attention, causal or under a mask (R, 1, C, L + C) or a causal bias; a key head serves its H/K query heads."""
    if isinstance(bias, Tensor) and not isinstance(bias, CausalBias):
        bias = bias.to(query.dtype)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=bias is None, scale=scaling, enable_gqa=True
    )


def _cuts(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of equal labels, cut into ranges (start, end) of at most `BUCKET`. Example: [0, 0, 1] -> (0, 2), (2, 3)."""
    cuts, start = [], 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or labels[end] != labels[start] or end - start == BUCKET:
            cuts.append((start, end))
            start = end
    return cuts
