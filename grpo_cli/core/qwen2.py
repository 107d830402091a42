"""One decoding step of a Qwen2 model, written out in as few operations as it takes.

The arithmetic is that of transformers' own forward pass, which serves every other architecture; there, a small
model's step spends most of its time between operations. Knows neither sampling nor what a plan attends to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import embedding
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from grpo_cli.core.attention import Plan, attention_dtype


class _Layer(NamedTuple):
    """Weights of one layer, those that are multiplied in the dtype to compute in."""

    norm: Tensor
    query_key_value: Tensor
    bias: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


def fits(model: PreTrainedModel) -> bool:
    """Whether `Step` computes what this model does."""
    return type(model) is Qwen2ForCausalLM and model.config.rope_parameters["rope_type"] == "default"


class Step:
    """Decode one token a row: call it with tokens (B,), positions (B,) below `longest`, and a plan; logits (B, V) back.

    Made for one rollout: it holds copies of the projections that it merges, and of all weights not yet in `dtype`.
    """

    def __init__(self, model: PreTrainedModel, *, longest: int, dtype: torch.dtype) -> None:
        decoder, config = model.get_decoder(), model.config
        self.device = model.device.type
        self.attend_in = attention_dtype(model.device, dtype)
        self.dtype, self.epsilon = dtype, float(config.rms_norm_eps)
        self.activation: Callable[[Tensor], Tensor] = decoder.layers[0].mlp.act_fn
        self.width = decoder.layers[0].self_attn.head_dim
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.embedding = decoder.embed_tokens.weight
        self.norm = decoder.norm.weight
        self.head = self._columns(model.get_output_embeddings().weight)
        self.layers = [self._layer(layer) for layer in decoder.layers]
        positions = torch.arange(longest, device=self.embedding.device)
        cosines, sines = decoder.rotary_emb(self.embedding, positions[None])  # (1, longest, d)
        turned = torch.cat([-sines[0, :, : self.width // 2], sines[0, :, self.width // 2 :]], dim=-1)
        self.cosines, self.sines = cosines[0, :, None].to(self.attend_in), turned[:, None].to(self.attend_in)

    def _layer(self, layer: Qwen2DecoderLayer) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return _Layer(
            layer.input_layernorm.weight,
            self._columns(*(projection.weight for projection in projections)),
            torch.cat([projection.bias for projection in projections]).to(self.dtype),
            self._columns(attention.o_proj.weight),
            layer.post_attention_layernorm.weight,
            self._columns(mlp.gate_proj.weight, mlp.up_proj.weight),
            self._columns(mlp.down_proj.weight),
        )

    def _columns(self, *weights: Tensor) -> Tensor:
        """Weights (out, in), side by side as one matrix (in, out): few rows are multiplied faster by it."""
        return torch.cat(weights).to(self.dtype).t().contiguous()

    def __call__(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        with torch.autocast(self.device, enabled=False):
            return self._logits(tokens, positions, plan)

    def _logits(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        cosines, sines = self.cosines[positions], self.sines[positions]  # (B, 1, d)
        turned = self.heads + self.key_value_heads
        hidden = embedding(tokens, self.embedding)  # (B, D)
        for index, layer in enumerate(self.layers):
            mixed = torch.addmm(layer.bias, self._normed(hidden, layer.norm), layer.query_key_value)
            mixed = mixed.to(self.attend_in).view(len(tokens), -1, self.width)  # (B, H + 2 * K, d)
            rotated = _rotate(mixed[:, :turned], cosines, sines)[:, :, None]
            query, key, value = rotated[:, : self.heads], rotated[:, self.heads :], mixed[:, turned:, None]
            attended = plan.attend(index, query, key, value, self.width**-0.5)
            hidden = hidden + attended.reshape(len(tokens), -1).to(self.dtype) @ layer.output
            gate, up = (self._normed(hidden, layer.mlp_norm) @ layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + (self.activation(gate) * up) @ layer.down
        return self._normed(hidden, self.norm) @ self.head

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """`hidden` over its root mean square, times `weight`."""
        norm: Tensor = vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / hidden.shape[-1] + self.epsilon).rsqrt()
        return (hidden * scale * weight).to(self.dtype)


def _rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions: the halves (x, y) of each head become (x cos - y sin, y cos + x sin)."""
    return torch.addcmul(heads * cosines, heads.roll(heads.shape[-1] // 2, dims=-1), sines)
