"""Triton kernels: attention of a decode step, log-probabilities and SwiGLU, each in one kernel.

Arithmetic is float32 for any tensor dtype. Used on CUDA; tests run them in Triton's interpreter and compare them with
the plain code they replace. Letters as in attention.py; M tokens, V vocabulary, I inner width.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

KEYS = 64  # most keys per read of `decode_attention`
NUMBERS = {2: 8192, 4: 2048}  # most numbers per read, by their bytes: more spill, or exceed the 99 kB of sm_86 and 120
COLUMNS = 4096  # logits or inner values per read


def decode_attention(
    heads: Tensor,
    cosines: Tensor,
    sines: Tensor,
    prompts: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    lengths: Tensor,
    slot: Tensor,
    scaling: float,
) -> Tensor:
    """Rotate one token of each of P * G completions, write its key and value at `slot` (1,), and attend: (B, H, d).

    `heads` (B, H + 2 K, d) holds queries, keys and values before rotation; `cosines` (B, 1, d) and `sines` (B, 1, d /
    2) their positions. `prompts` are keys and values (P, K, L, d), of which the first `lengths` (P,) are real; `own`
    are the completions' (P, K, G, C, d), of which the first `slot` are.
    """
    count, key_heads, generations, _, width = own[0].shape
    queries = heads.shape[1] - 2 * key_heads
    assert heads.is_contiguous() and all(cache.is_contiguous() for cache in (*prompts, *own))
    attended = heads.new_empty(len(heads), queries, width)
    padded = max(16, triton.next_power_of_2(width))
    _decode_attention[(count * generations, key_heads)](
        heads, cosines.contiguous(), sines.contiguous(), *prompts, *own, lengths, slot, attended, scaling,
        generations, prompts[1].shape[2], own[0].shape[3], key_heads, queries // key_heads, width,
        max(16, triton.next_power_of_2(queries // key_heads)), padded,
        max(16, min(KEYS, NUMBERS[heads.element_size()] // padded)),
    )  # fmt: skip
    return attended


@triton.jit
def _decode_attention(
    heads, cosines, sines, prompt_keys, prompt_values, own_keys, own_values, lengths, slot, attended, scaling,
    G, L, C, K: tl.constexpr, SHARING: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per completion and key-value head; pads its SHARING query heads to QUERIES, and D to WIDTH."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim, query = tl.arange(0, WIDTH), tl.arange(0, QUERIES)
    real, turned = dim < D, (dim + D // 2) % D  # each dimension is rotated with the one half a head away
    cos = tl.load(cosines + row * D + dim, mask=real, other=0.0).to(tl.float32)
    sin = tl.load(sines + row * (D // 2) + dim % (D // 2), mask=real, other=0.0).to(tl.float32)
    sin = tl.where(dim < D // 2, -sin, sin)

    first = heads + row * (K * SHARING + 2 * K) * D
    places = first + (head * SHARING + query)[:, None] * D
    queried = (query < SHARING)[:, None] & real[None, :]
    q = tl.load(places + dim[None, :], mask=queried, other=0.0).to(tl.float32) * cos[None, :]
    q += tl.load(places + turned[None, :], mask=queried, other=0.0).to(tl.float32) * sin[None, :]
    q = q.to(heads.dtype.element_ty)
    place = first + (K * SHARING + head) * D
    key = tl.load(place + dim, mask=real, other=0.0).to(tl.float32) * cos
    key += tl.load(place + turned, mask=real, other=0.0).to(tl.float32) * sin
    key = key.to(heads.dtype.element_ty)
    value = tl.load(place + K * D + dim, mask=real, other=0.0)

    prompt, end = row // G, tl.load(slot).to(tl.int32)
    own = ((prompt * K + head) * G + row % G) * C * D
    tl.store(own_keys + own + end * D + dim, key, mask=real)
    tl.store(own_values + own + end * D + dim, value, mask=real)

    # Online softmax: largest score, sum of exponentials, weighted sum of values.
    largest = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scaling  # (QUERIES,)
    total = tl.full((QUERIES,), 1.0, tl.float32)
    out = tl.zeros((QUERIES, WIDTH), tl.float32) + value.to(tl.float32)[None, :]
    shared, length = (prompt * K + head) * L * D, tl.load(lengths + prompt).to(tl.int32)
    state = _attend(
        q, prompt_keys + shared, prompt_values + shared, length, scaling, largest, total, out, D, WIDTH, BLOCK
    )
    largest, total, out = state
    state = _attend(q, own_keys + own, own_values + own, end, scaling, largest, total, out, D, WIDTH, BLOCK)
    largest, total, out = state
    to = attended + (row * K * SHARING + head * SHARING + query)[:, None] * D + dim[None, :]
    tl.store(to, (out / total[:, None]).to(attended.dtype.element_ty), mask=queried)


@triton.jit
def _attend(
    q, keys, values, count, scaling, largest, total, out,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state of an online softmax after the first `count` of these keys and values, which have D numbers each."""
    dim = tl.arange(0, WIDTH)
    real = dim < D
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < count
        places, mask = at[:, None] * D + dim[None, :], there[:, None] & real[None, :]
        k = tl.load(keys + places, mask=mask, other=0.0)
        v = tl.load(values + places, mask=mask, other=0.0)
        scores = tl.where(there[None, :], tl.dot(q, k.T, input_precision="ieee") * scaling, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, axis=1))
        weights, before = tl.exp(scores - top[:, None]), tl.exp(largest - top)
        out = out * before[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest, total = top, total * before + tl.sum(weights, axis=1)
    return largest, total, out


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float, *, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) and entropies (M,), zeros unless `entropy`; as `logprobs.token_logprobs`.

    Reads the logits (M, V) once forward and once backward, and stores nothing else of their size.
    """
    return cast("tuple[Tensor, Tensor]", _TokenLogprobs.apply(logits, targets, temperature, entropy))


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        rows, logits = len(targets), logits.contiguous()
        chosen, entropies, norms = torch.zeros(3, rows, device=logits.device).unbind()
        if rows:
            _logprobs[(rows,)](
                logits, targets, chosen, entropies, norms, temperature, logits.shape[1], entropy, COLUMNS
            )
        ctx.save_for_backward(logits, targets, norms)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, norms = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        grid = (len(targets), triton.cdiv(logits.shape[1], COLUMNS))
        if len(targets):
            _logprobs_backward[grid](
                logits, targets, norms, gradients[0].contiguous(), of_logits, ctx.temperature, logits.shape[1], COLUMNS
            )
        return of_logits, None, None, None


@triton.jit
def _logprobs(
    logits, targets, chosen, entropies, norms, temperature, V, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest, total, weighted = -1e30, 0.0, 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32) / temperature
        top = tl.maximum(largest, tl.max(x, axis=0))
        weights, before = tl.exp(x - top), tl.exp(largest - top)
        total = total * before + tl.sum(weights, axis=0)
        if ENTROPY:
            weighted = weighted * before + tl.sum(weights * tl.maximum(x, -1e30), axis=0)
        largest = top
    norm = largest + tl.log(total)
    target = tl.load(logits + row * V + tl.load(targets + row)).to(tl.float32) / temperature
    tl.store(chosen + row, target - norm)
    tl.store(norms + row, norm)
    if ENTROPY:
        tl.store(entropies + row, norm - weighted / total)


@triton.jit
def _logprobs_backward(logits, targets, norms, gradients, of_logits, temperature, V, BLOCK: tl.constexpr):
    """d log p(t) / d logits = (one-hot(t) - p) / temperature."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32) / temperature
    hit = tl.where(at == tl.load(targets + row), 1.0, 0.0)
    gradient = (hit - tl.exp(x - tl.load(norms + row))) * (tl.load(gradients + row) / temperature)
    tl.store(of_logits + row * V + at, gradient.to(of_logits.dtype.element_ty), mask=at < V)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (M, I), rows may be strided; saves only the two inputs for the backward pass."""
    return cast("Tensor", _SwiGLU.apply(gate, up))


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if len(gate):
            _swiglu[_grid(gate)](gate, up, out, gate.stride(0), up.stride(0), gate.shape[1], COLUMNS // 4)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty(2, *gate.shape, dtype=gate.dtype, device=gate.device).unbind()
        if len(gate):
            _swiglu_backward[_grid(gate)](
                gate, up, gradients[0].contiguous(), of_gate, of_up, gate.stride(0), up.stride(0), gate.shape[1],
                COLUMNS // 4,
            )  # fmt: skip
        return of_gate, of_up


def _grid(matrix: Tensor) -> tuple[int, int]:
    return len(matrix), triton.cdiv(matrix.shape[1], COLUMNS // 4)


@triton.jit
def _swiglu(gates, ups, out, gate_stride, up_stride, WIDTH, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gates + row * gate_stride + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(ups + row * up_stride + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _swiglu_backward(gates, ups, gradients, of_gate, of_up, gate_stride, up_stride, WIDTH, BLOCK: tl.constexpr):
    """With s = sigmoid(g): d/dg = u s (1 + g (1 - s)), d/du = g s."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gates + row * gate_stride + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(ups + row * up_stride + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    gradient = tl.load(gradients + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    for_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(of_gate + row * WIDTH + at, for_gate.to(of_gate.dtype.element_ty), mask=at < WIDTH)
    tl.store(of_up + row * WIDTH + at, (gradient * gate * sigmoid).to(of_up.dtype.element_ty), mask=at < WIDTH)
