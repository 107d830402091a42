"""The forward pass of a Qwen2 model, written out in as few operations as it takes.

The arithmetic is that of transformers' own forward pass, which serves every other architecture; there, a small
model's step spends most of its time between and around the multiplications. Knows neither sampling nor what a plan
attends to.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import vector_norm
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from grpo_cli.core.attention import Plan, attention_dtype


class _Layer(NamedTuple):
    """Weights of one layer, (in, out), in the dtype to compute in; those of its norms are multiplied into them."""

    query_key_value: Tensor
    bias: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor


def fits(model: PreTrainedModel) -> bool:
    """Whether `Pass` computes what this model does."""
    if type(model) is not Qwen2ForCausalLM:
        return False
    plain: bool = model.config.rope_parameters["rope_type"] == "default" and model.config.hidden_act == "silu"
    return plain


class Pass:
    """Forward passes at positions below `longest`, with the weights as they are when it is made.

    Made for one rollout or one update: it holds copies of the projections that it merges, which lie in the graph if
    gradients are wanted, and of all weights not yet in `dtype`.
    """

    def __init__(self, model: PreTrainedModel, *, longest: int, dtype: torch.dtype) -> None:
        decoder, config = model.get_decoder(), model.config
        self.device = model.device.type
        self.attend_in = attention_dtype(model.device, dtype)
        self.dtype, self.epsilon = dtype, torch.tensor(config.rms_norm_eps, device=model.device)
        self.width = decoder.layers[0].self_attn.head_dim
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.embed = decoder.embed_tokens
        self.norm = decoder.norm.weight
        self.output: Tensor = model.get_output_embeddings().weight
        self.layers = [self._layer(layer) for layer in decoder.layers]
        positions = torch.arange(longest, device=model.device)
        cosines, sines = decoder.rotary_emb(self.norm, positions[None])  # (1, longest, d)
        self.cosines, self.sines = (part[0, :, None].to(self.attend_in) for part in (cosines, sines))
        self.sines = self.sines[..., : self.width // 2]  # the other half is the same

    def _layer(self, layer: Qwen2DecoderLayer) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        merged = torch.cat([projection.weight for projection in projections]) * layer.input_layernorm.weight
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * layer.post_attention_layernorm.weight
        bias = torch.cat([projection.bias for projection in projections])
        weights = (attention.o_proj.weight, gate_up, mlp.down_proj.weight)
        # Few rows are multiplied faster by columns that lie in a row of memory.
        return _Layer(self._columns(merged), bias.to(self.dtype), *map(self._columns, weights))

    def _columns(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).t().contiguous()

    def hidden(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Final hidden states (B, T, D) of `tokens` (B, T) at `positions` (B, T), attending as `plan` says."""
        rows, count = tokens.shape  # of the matrices below there is a row for each of M = B * T tokens
        with torch.autocast(self.device, enabled=False):
            places = positions.flatten()
            cosines, sines = self.cosines[places], self.sines[places]  # (M, 1, d), (M, 1, d / 2)
            hidden = self.embed(tokens.flatten())  # (M, D)
            for index, layer in enumerate(self.layers):
                mixed = torch.addmm(layer.bias, self._normed(hidden), layer.query_key_value)
                heads = mixed.to(self.attend_in).view(rows * count, -1, self.width)  # (M, H + 2 * K, d)
                turned = _rotated(heads, cosines, sines, self.key_value_heads)
                query, key, value = (part.view(rows, count, -1, self.width).transpose(1, 2) for part in turned)
                attended = plan.attend(index, query, key, value, self.width**-0.5)
                hidden = hidden + attended.reshape(rows * count, -1).to(self.dtype) @ layer.output
                hidden = hidden + _gated(self._normed(hidden) @ layer.gate_up) @ layer.down
            final: Tensor = _normed(hidden, self.epsilon) * self.norm
            return final.to(self.norm.dtype).view(rows, count, -1)

    @cached_property
    def _head(self) -> Tensor:
        return self.output.to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        with torch.autocast(self.device, enabled=False):
            return linear(hidden.to(self.dtype), self._head)

    def _normed(self, hidden: Tensor) -> Tensor:
        return _normed(hidden, self.epsilon).to(self.dtype)


def _normed(hidden: Tensor, epsilon: Tensor) -> Tensor:
    """Vectors x (M, D) over their root mean square, in float32."""
    if not torch.is_grad_enabled():
        return hidden * _scale(hidden, epsilon)  # a Function costs more than the arithmetic of a few rows
    return cast("Tensor", _Normed.apply(hidden, epsilon))  # type: ignore[no-untyped-call]


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor, key_value_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (M, H, d), keys and values (M, K, d) from `heads` (M, H + 2 * K, d), all but the values turned.

    Rotary positions: the halves (x, y) of each head become (x cos - y sin, y cos + x sin). `cosines` are (M, 1, d),
    `sines` (M, 1, d / 2).
    """
    if not torch.is_grad_enabled():
        return _parts(heads, cosines, sines, key_value_heads)
    found = _Rotate.apply(heads, cosines, sines, key_value_heads)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor, Tensor]", found)


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (M, F), of [gate | up] (M, 2 * F)."""
    if not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)
    return cast("Tensor", _Gated.apply(gate_up))  # type: ignore[no-untyped-call]


def _scale(hidden: Tensor, epsilon: Tensor) -> Tensor:
    """One over the root mean squares (M, 1)."""
    norm = vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.addcmul(epsilon, norm, norm, value=1 / hidden.shape[-1]).rsqrt_()


class _Normed(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, epsilon: Tensor) -> Tensor:
        scale = _scale(hidden, epsilon)
        normed = hidden * scale
        ctx.save_for_backward(normed, scale)
        ctx.dtype = hidden.dtype
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """With y = x s: d/dx = s (g - y mean(g y))."""
        normed, scale = ctx.saved_tensors
        mean = (gradients[0] * normed).mean(dim=-1, keepdim=True)
        return torch.addcmul(gradients[0], normed, mean, value=-1).mul_(scale).to(ctx.dtype), None


class _Rotate(Function):
    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor, key_value_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        return _parts(heads, cosines, sines, key_value_heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """What was turned one way is turned back, into one gradient of all heads."""
        query, key, value = gradients
        cosines, sines = ctx.saved_tensors
        found = query.new_empty(len(query), query.shape[1] + 2 * key.shape[1], query.shape[2])
        of_query, of_key, of_value = found.split([query.shape[1], key.shape[1], key.shape[1]], dim=1)
        _turn(query, cosines, sines, of_query, direction=-1)
        _turn(key, cosines, sines, of_key, direction=-1)
        of_value.copy_(value)
        return found, None, None, None


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Both halves are written where they belong."""
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        found = torch.empty_like(gate_up)
        of_gate, of_up = found.chunk(2, dim=-1)
        torch.mul(gradients[0], activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=of_gate)
        return found


def _parts(heads: Tensor, cosines: Tensor, sines: Tensor, key_value_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    turning, value = heads[:, :-key_value_heads], heads[:, -key_value_heads:]
    turned = _turn(turning, cosines, sines, torch.empty_like(turning))
    return turned[:, :-key_value_heads], turned[:, -key_value_heads:], value


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor, out: Tensor, *, direction: int = 1) -> Tensor:
    torch.mul(heads, cosines, out=out)
    (x, y), (left, right) = heads.chunk(2, dim=-1), out.chunk(2, dim=-1)
    left.addcmul_(y, sines, value=-direction)
    right.addcmul_(x, sines, value=direction)
    return out
