"""The forward pass of a Qwen2 model, written out in as few operations as it takes.

The arithmetic is that of transformers' own forward pass, which serves every other architecture; there, a small
model's step spends most of its time between and around the multiplications. Knows neither sampling nor what a plan
attends to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import vector_norm
from torch.nn.functional import linear
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
    return type(model) is Qwen2ForCausalLM and model.config.rope_parameters["rope_type"] == "default"


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
        self.activation: Callable[[Tensor], Tensor] = decoder.layers[0].mlp.act_fn
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

    def hidden(self, tokens: Tensor, positions: Tensor, plan: Plan, *, packed: bool = False) -> Tensor:
        """Final hidden states (M, D) of tokens (M,): M rows of one token each, or one row of M if `packed`."""
        with torch.autocast(self.device, enabled=False):
            cosines, sines = self.cosines[positions], self.sines[positions]  # (M, 1, d), (M, 1, d / 2)
            hidden = self.embed(tokens)  # (M, D)
            for index, layer in enumerate(self.layers):
                mixed = torch.addmm(layer.bias, self._normed(hidden), layer.query_key_value)
                heads = mixed.to(self.attend_in).view(len(tokens), -1, self.width)  # (M, H + 2 * K, d)
                turning, value = heads.split([self.heads + self.key_value_heads, self.key_value_heads], dim=1)
                query, key = _rotated(turning, cosines, sines).split([self.heads, self.key_value_heads], dim=1)
                shaped = [part.transpose(0, 1)[None] if packed else part[:, :, None] for part in (query, key, value)]
                attended = plan.attend(index, shaped[0], shaped[1], shaped[2], self.width**-0.5)
                hidden = hidden + attended.reshape(len(tokens), -1).to(self.dtype) @ layer.output
                gate, up = (self._normed(hidden) @ layer.gate_up).chunk(2, dim=-1)
                hidden = hidden + (self.activation(gate) * up) @ layer.down
            final: Tensor = _normed(hidden, self.epsilon) * self.norm
            return final.to(self.norm.dtype)

    @cached_property
    def _head(self) -> Tensor:
        return self.output.to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (M, V) of hidden states (M, D)."""
        return linear(hidden.to(self.dtype), self._head)

    def _normed(self, hidden: Tensor) -> Tensor:
        return _normed(hidden, self.epsilon).to(self.dtype)


def _normed(hidden: Tensor, epsilon: Tensor) -> Tensor:
    """Vectors x (M, D) over their root mean square, in float32."""
    if not torch.is_grad_enabled():
        return hidden * _scale(hidden, epsilon)  # a Function costs more than the arithmetic of a few rows
    return cast("Tensor", _Normed.apply(hidden, epsilon))  # type: ignore[no-untyped-call]


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions: the halves (x, y) of each head (M, H, d) become (x cos - y sin, y cos + x sin).

    `cosines` are (M, 1, d), `sines` (M, 1, d / 2).
    """
    if not torch.is_grad_enabled():
        return _turn(heads, cosines, sines)
    return cast("Tensor", _Rotate.apply(heads, cosines, sines))  # type: ignore[no-untyped-call]


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
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turn(heads, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """What was turned one way is turned back."""
        cosines, sines = ctx.saved_tensors
        return _turn(gradients[0], cosines, -sines), None, None


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    turned = heads * cosines
    (x, y), (left, right) = heads.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    left.addcmul_(y, sines, value=-1)
    right.addcmul_(x, sines)
    return turned
