"""The forward pass of Llama, Mistral and Qwen2 models in as few operations as possible.

The arithmetic is that of transformers' own forward, which all other architectures use. For small models, transformers
spends most of a step between and around the multiplications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import vector_norm
from torch.nn.functional import linear, rms_norm
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from grpo_cli.core.model.attention import Plan, StaticDecode, attention_dtype, no_autocast


def fits(model: PreTrainedModel) -> bool:
    """Whether `Pass` supports this model."""
    config = model.config
    if type(model) not in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM):
        return False
    has_other_biases = type(model) is LlamaForCausalLM and (config.attention_bias or config.mlp_bias)
    return config.rope_parameters["rope_type"] in ("default", "linear", "llama3") and not has_other_biases


def _biases(projections: Iterable[torch.nn.Module]) -> list[Tensor]:
    """The biases of q, k and v, which only Qwen2 has."""
    return [cast("Tensor", part.bias) for part in projections if part.bias is not None]


class _Merged:
    """A layer's weights copied for few, small multiplications: (in, out), joined, norms multiplied in."""

    def __init__(self, layer: Any, dtype: torch.dtype, epsilon: Tensor) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.dtype, self.epsilon = dtype, epsilon
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn

        def columns(weight: Tensor) -> Tensor:
            # With few rows, contiguous columns multiply faster.
            return weight.to(dtype).t().contiguous()

        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        merged = torch.cat([projection.weight for projection in projections]) * layer.input_layernorm.weight
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * layer.post_attention_layernorm.weight
        biases = _biases(projections)
        self.bias = torch.cat(biases).to(dtype) if biases else None
        self.query_key_value, self.gate_up = columns(merged), columns(gate_up)
        self.output, self.down = columns(attention.o_proj.weight), columns(mlp.down_proj.weight)

    def projected(self, hidden: Tensor) -> Tensor:
        """Queries, keys and values (M, (H + 2 * K) * d) of hidden states (M, D)."""
        normed = self._normed(hidden)
        if self.bias is None:
            return normed @ self.query_key_value
        return torch.addmm(self.bias, normed, self.query_key_value)

    def mixed(self, attended: Tensor) -> Tensor:
        """Attention's output (M, H * d) projected to the hidden size (M, D)."""
        return attended @ self.output

    def fed_forward(self, hidden: Tensor) -> Tensor:
        """Output (M, D) of the feed-forward block for hidden states (M, D)."""
        gate, up = (self._normed(hidden) @ self.gate_up).chunk(2, dim=-1)
        return (self.activation(gate) * up) @ self.down

    def _normed(self, hidden: Tensor) -> Tensor:
        return _normed(hidden, self.epsilon).to(self.dtype)


class _Direct:
    """A layer's own weights, read at every use; the same arithmetic as `_Merged`."""

    def __init__(self, layer: Any, epsilon: float, *, fused: bool) -> None:
        self.layer, self.epsilon, self.fused = layer, epsilon, fused

    def projected(self, hidden: Tensor) -> Tensor:
        attention, weight = self.layer.self_attn, self.layer.input_layernorm.weight
        normed = rms_norm(hidden, weight.shape, weight, self.epsilon)
        return _joined(normed, (attention.q_proj, attention.k_proj, attention.v_proj))

    def mixed(self, attended: Tensor) -> Tensor:
        return cast("Tensor", self.layer.self_attn.o_proj(attended))

    def fed_forward(self, hidden: Tensor) -> Tensor:
        mlp, weight = self.layer.mlp, self.layer.post_attention_layernorm.weight
        normed = rms_norm(hidden, weight.shape, weight, self.epsilon)
        gate, up = _joined(normed, (mlp.gate_proj, mlp.up_proj)).chunk(2, dim=-1)
        if self.fused:
            from grpo_cli.core.model import kernels  # imports Triton

            return cast("Tensor", mlp.down_proj(kernels.swiglu(gate, up)))
        return cast("Tensor", mlp.down_proj(mlp.act_fn(gate) * up))


def adjoin(model: PreTrainedModel) -> None:
    """Move weights with the same input next to each other, so one product serves them all.

    The parameters keep their names and values. Does nothing if they are already adjacent, or have adapters.
    """
    for layer in model.get_decoder().layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj))
        plain = [group for group in groups if _are_plain(group)]
        weights = [[part.weight for part in group] for group in plain]
        for parts in filter(None, [*weights, *map(_biases, plain)]):
            # Inference tensors cannot be used in a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                if _as_one(parts) is None:
                    joined = torch.cat([part.data for part in parts])
                    for part, place in zip(parts, joined.split([len(part) for part in parts]), strict=True):
                        part.data = place


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """Adjacent tensors (N_i, ...) as one (sum of N_i, ...), without a gradient; None if they are apart."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if part.data_ptr() != end or not same or not part.is_contiguous():
            return None
        end += part.nbytes
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _are_plain(projections: Sequence[torch.nn.Module]) -> bool:
    """Whether none of the layers has an adapter."""
    return all(type(part) is torch.nn.Linear for part in projections)


def _joined(hidden: Tensor, projections: Sequence[torch.nn.Module]) -> Tensor:
    """Outputs (M, sum of N_i) of linear layers for the same hidden states (M, D): one product of adjacent weights."""
    if _are_plain(projections):
        weights, biases = [cast("Tensor", part.weight) for part in projections], _biases(projections)
        joined, bias = _as_one(weights), _as_one(biases) if biases else None
        if joined is not None and (bias is not None or not biases):
            if not torch.is_grad_enabled():
                return linear(hidden, joined, bias)
            return cast("Tensor", _Product.apply(hidden, joined, bias, *weights, *biases))  # type: ignore[no-untyped-call]
    return torch.cat([part(hidden) for part in projections], dim=-1)


class _Product(Function):
    """One product with adjacent weights; their gradients are parts of one product too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, joined: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, joined)
        ctx.sizes = [len(part) for part in parts]
        ctx.has_bias = bias is not None
        return linear(hidden, joined, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, joined = ctx.saved_tensors
        (gradient,) = gradients
        both = [gradient.t() @ hidden, *([gradient.sum(dim=0)] if ctx.has_bias else [])]
        sizes = ctx.sizes[: len(ctx.sizes) // len(both)]
        return gradient @ joined, None, None, *(part for whole in both for part in whole.split(sizes))


class Pass:
    """Forward passes at positions below `longest`, computed in `dtype`.

    By default for one rollout or one update, with the weights at the time of creation: it holds merged copies of
    projections (part of the graph, if gradients are enabled) and copies of all weights of another dtype. With
    `in_place` it copies nothing and reads the model's current weights, which must be of `dtype`; then it can be
    `fused`, with Triton's kernels, and recompute layers in the backward pass by `checkpointing`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        longest: int,
        dtype: torch.dtype,
        in_place: bool = False,
        fused: bool = False,
        checkpointing: bool = False,
    ) -> None:
        decoder, config = model.get_decoder(), model.config
        self.config = config
        assert not in_place or model.dtype == dtype
        if in_place:
            adjoin(model)
        self.in_place, self.fused, self.checkpointing = in_place, fused, checkpointing
        self.attend_in = attention_dtype(model.device, dtype)
        self.dtype, self.epsilon = dtype, torch.tensor(config.rms_norm_eps, device=model.device)
        self.width = decoder.layers[0].self_attn.head_dim
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.embed = decoder.embed_tokens
        self.norm = decoder.norm.weight
        self.output: Tensor = model.get_output_embeddings().weight
        self.layers: Sequence[_Merged | _Direct] = (
            [_Direct(layer, config.rms_norm_eps, fused=fused) for layer in decoder.layers]
            if in_place
            else [_Merged(layer, dtype, self.epsilon) for layer in decoder.layers]
        )
        positions = torch.arange(longest, device=model.device)
        cosines, sines = decoder.rotary_emb(self.norm.float(), positions[None])  # (1, longest, d)
        self.cosines, self.sines = (part[0, :, None].to(self.attend_in) for part in (cosines, sines))
        self.sines = self.sines[..., : self.width // 2]  # both halves are equal

    def hidden(self, tokens: Tensor, positions: Tensor, plan: Plan, *, packed: bool = False) -> Tensor:
        """Final hidden states (M, D) of tokens (M,): M rows of one token each, or one row of M if `packed`."""
        with no_autocast(self.norm.device):
            cosines, sines = self.cosines[positions], self.sines[positions]  # (M, 1, d), (M, 1, d / 2)
            hidden = self.embed(tokens)  # (M, D)
            for index in range(len(self.layers)):
                given = (index, hidden, cosines, sines, plan, packed)
                if self.checkpointing and torch.is_grad_enabled():
                    hidden = checkpoint(self._layer, *given, use_reentrant=False, preserve_rng_state=False)
                else:
                    hidden = self._layer(*given)
            if self.in_place:
                return rms_norm(hidden, self.norm.shape, self.norm, self.config.rms_norm_eps)
            final: Tensor = _normed(hidden, self.epsilon) * self.norm
            return final.to(self.norm.dtype)

    def _layer(self, index: int, hidden: Tensor, cosines: Tensor, sines: Tensor, plan: Plan, packed: bool) -> Tensor:
        """Hidden states (M, D) after one more layer."""
        layer, rows, scaling = self.layers[index], len(hidden), self.width**-0.5
        heads = layer.projected(hidden).to(self.attend_in).view(rows, -1, self.width)
        if self.fused and isinstance(plan, StaticDecode):
            attended = plan.attend_fused(index, heads, cosines, sines, scaling)
        else:
            turning, value = heads.split([self.heads + self.key_value_heads, self.key_value_heads], dim=1)
            query, key = _rotated(turning, cosines, sines).split([self.heads, self.key_value_heads], dim=1)
            shaped = [part.transpose(0, 1)[None] if packed else part[:, :, None] for part in (query, key, value)]
            attended = plan.attend(index, shaped[0], shaped[1], shaped[2], scaling)
        hidden = hidden + layer.mixed(attended.reshape(rows, -1).to(self.dtype))
        return hidden + layer.fed_forward(hidden)

    @cached_property
    def _head(self) -> Tensor:
        return self.output.to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (M, V) of hidden states (M, D)."""
        return linear(hidden.to(self.dtype), self._head)


def _normed(hidden: Tensor, epsilon: Tensor) -> Tensor:
    """Vectors x (M, D) divided by their root mean square, in float32."""
    if not torch.is_grad_enabled():
        return hidden * _scale(hidden, epsilon)  # for few rows, a Function costs more than the arithmetic
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
        """The inverse rotation."""
        cosines, sines = ctx.saved_tensors
        return _turn(gradients[0], cosines, -sines), None, None


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    turned = heads * cosines
    (x, y), (left, right) = heads.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    left.addcmul_(y, sines, value=-1)
    right.addcmul_(x, sines)
    return turned
