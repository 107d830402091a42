"""Group relative policy optimization: advantages, policy loss, KL, and one update of the weights.

P prompts, G completions each, B = P * G rows of at most T tokens; m the completion mask (B, T):

    A[p,g] = (r[p,g] - mean_g r[p]) / (std_g r[p] + 1e-4)
    ratio  = exp(l - l_old)
    policy = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)
    kl     = exp(d) - d - 1,  d = l_ref - l
    loss   = sum over rows and tokens of w * m * (policy + beta * kl)

`w` is the normaliser of the loss type over the whole step, so micro-batches do not change the gradient.

Unlike the paper (DeepSeekMath, arXiv 2402.03300) l_old is the detached l of the first inner update, exactly what a
separate pass would return, and a group of equal rewards has exactly zero advantage. Unlike the original system the KL
is k3 as Schulman defines it (its README turns d around, `kl_estimator = "original"`), and log-probabilities are those
of the sampling distribution, temperature included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss

STD_EPSILON = 1e-4


def advantages(rewards: Tensor, *, scale: str = "group") -> Tensor:
    """Advantages (P, G) of rewards (P, G): reward minus its group's mean, over the standard deviation (ddof = 1).

    `scale` selects the standard deviation: of the group, of the whole batch, or none. Groups of equal rewards give
    exactly zero.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(zero_variance(rewards)[:, None], 0.0)
    if scale == "none" or rewards.shape[1] == 1:
        return centred
    deviation = rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (deviation + STD_EPSILON)


def zero_variance(rewards: Tensor) -> Tensor:
    """(P,) boolean: groups of rewards (P, G) that are all equal and so have no gradient."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def overlong_penalty(length: int, *, soft_limit: int, max_new_tokens: int) -> float:
    """Soft overlong punishment of a completion of `length` tokens: equation 13 of DAPO (arXiv 2503.14476), negated.

    0 up to `soft_limit`, then (length - soft_limit) / (max_new_tokens - soft_limit): 1 at `max_new_tokens`. DAPO has
    L_max = max_new_tokens = 20,480 and L_max - L_cache = soft_limit = 16,384, and subtracts it from the reward.
    """
    return max(0, length - soft_limit) / (max_new_tokens - soft_limit)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k3") -> Tensor:
    """Per-token estimate (B, T) of KL(policy || reference) from samples of the policy.

    "k3" is Schulman's exp(d) - d - 1 with d = l_ref - l (joschu.net/blog/kl-approx.html): unbiased, never negative.
    "original" flips the sign of d, as in the original system; it does not estimate this KL.
    """
    difference = ref_logprobs - logprobs if estimator == "k3" else logprobs - ref_logprobs
    return difference.exp() - difference - 1


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, mask: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Per-token loss (B, T) and which tokens were clipped (B, T), of log-probabilities (B, T) and advantages (B,).

    `cispo` (arXiv 2506.13585) weights log-probabilities by the detached ratio, capped at 1 + epsilon_high. `gspo`
    (arXiv 2507.18071) has one ratio per sequence: the exponential of the mean of its log-ratios.
    """
    log_ratio = logprobs - old_logprobs
    if loss.loss_type == "gspo":
        log_ratio = ((log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)).expand_as(logprobs)
    ratio = log_ratio.exp()
    gain = advantage[:, None]
    if loss.loss_type == "cispo":
        capped = ratio.clamp(max=1 + loss.epsilon_high).detach()
        return -capped * gain * logprobs, (ratio > 1 + loss.epsilon_high) & (gain != 0)
    clipped = ratio.clamp(1 - loss.epsilon, 1 + loss.epsilon_high)
    per_token = -torch.minimum(ratio * gain, clipped * gain)
    return per_token, clipped * gain < ratio * gain


@dataclass(frozen=True)
class Step:
    """Counts over the whole step, across ranks."""

    rows: int
    tokens: int
    has_gradient: bool  # whether any gradient may be nonzero


def normalizer(lengths: Tensor, *, loss_type: str, max_new_tokens: int, step: Step | None = None) -> Tensor:
    """Weight (B,) of each token of each row in the loss, from row lengths (B,) of the whole step or of part of one.

    `grpo` and `gspo`: mean over rows of the mean over tokens. `dapo` and `cispo`: mean over all tokens. `dr_grpo`: sum
    over tokens divided by rows times `max_new_tokens`, independent of length.
    """
    rows, tokens = (step.rows, step.tokens) if step else (len(lengths), int(lengths.sum()))
    if loss_type in ("grpo", "gspo"):
        return 1.0 / (rows * lengths)
    if loss_type == "dr_grpo":
        return torch.full(lengths.shape, 1.0 / (rows * max_new_tokens))
    return torch.full(lengths.shape, 1.0 / tokens)


def batch_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    weight: Tensor,
    loss: Loss,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows' part of the step's loss, clipped tokens (B, T), and KL (B, T) if there is a reference.

    Log-probabilities and `mask` are (B, T), advantages and the normaliser's `weight` (B,).
    """
    per_token, clipped = policy_loss(logprobs, old_logprobs, advantage, mask, loss)
    kl = None
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs, estimator=loss.kl_estimator)
        per_token = per_token + loss.beta * kl
    return (per_token * mask * weight[:, None]).sum(), clipped, kl
