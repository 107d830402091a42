"""Log-probabilities and entropies of tokens, from logits or hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

Entropy = Literal["none", "value", "gradient"]


def in_chunks(
    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], hidden: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """`compute(hidden, targets)`, both (M, ...), `chunk` tokens at a time and again in the backward pass; 0 is all."""
    if not 0 < chunk < len(targets):
        return compute(hidden, targets)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [checkpoint(compute, rows, labels, use_reentrant=False) for rows, labels in pairs]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, *, entropy: Entropy = "value", fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) of `targets` (M,) under softmax(logits (M, V) / temperature), and its entropies (M,).

    In float32, like log_softmax and gather, but with one float32 matrix for both directions; entropies with a gradient
    take three more. `fused`: by a Triton kernel.
    """
    if entropy == "gradient" and torch.is_grad_enabled():
        everything = (logits.float() / temperature).log_softmax(dim=-1)
        entropies = -(everything.exp() * everything).sum(dim=-1)
        return everything.gather(-1, targets[:, None])[:, 0], entropies
    if fused:
        from grpo_cli.core.model import kernels  # imports Triton

        return kernels.token_logprobs(logits, targets, temperature, entropy=entropy != "none")
    if entropy == "none" and not torch.is_grad_enabled():
        scaled = logits.to(torch.float32, copy=True).div_(temperature)
        chosen = scaled.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
        return chosen, torch.zeros_like(chosen)
    results = _TokenLogprobs.apply(logits, targets, temperature)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", results)


def scatter(flat: Tensor, lengths: Sequence[int], order: Sequence[int]) -> Tensor:
    """Values (M,) of tokens, row after row -> a padded matrix (B, T), zero elsewhere; row i becomes row order[i]."""
    mask = torch.arange(max(lengths), device=flat.device) < torch.tensor(lengths, device=flat.device)[:, None]
    padded = torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)
    return padded[torch.tensor(order, device=flat.device).argsort()]


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        targets = targets[:, None]
        scaled = logits.to(torch.float32, copy=True).div_(temperature)
        everything = scaled.log_softmax(dim=-1)
        chosen = everything.gather(-1, targets)[:, 0]
        probabilities = torch.exp(everything, out=scaled)  # allocating memory would cost more than the arithmetic
        entropy = -everything.mul_(probabilities).sum(dim=-1)
        ctx.save_for_backward(probabilities, targets)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d log p(t) / d logits = (one-hot(t) - p) / temperature."""
        probabilities, targets = ctx.saved_tensors
        scale = gradients[0][:, None] / ctx.temperature
        of_logits = probabilities.mul_(-scale).scatter_add_(-1, targets, scale)  # a second backward pass is refused
        return of_logits.to(ctx.dtype), None, None
