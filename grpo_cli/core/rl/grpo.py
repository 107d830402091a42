"""Group relative policy optimization: advantages, policy loss, KL, and one update of the weights.

P prompts, G completions each, B = P * G rows of at most T tokens; m the completion mask (B, T):

    A[p,g] = (r[p,g] - mean_g r[p]) / (std_g r[p] + 1e-4)
    ratio  = exp(l - l_old)
    policy = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)
    kl     = exp(d) - d - 1,  d = l_ref - l
    loss   = sum over rows and tokens of w * m * (policy + beta * kl)

`w` is the normaliser of the loss type over the whole step, so micro-batches do not change the gradient. Each choice
of the settings replaces one of these lines.

Unlike the paper (DeepSeekMath, arXiv 2402.03300) l_old is the detached l of the first inner update, exactly what a
separate pass would return, and a group of equal rewards has exactly zero advantage. Unlike the original system the KL
is k3 as Schulman defines it (its README turns d around, `kl_estimator = "original"`), and log-probabilities are those
of the sampling distribution, temperature included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss

STD_EPSILON = 1e-4


def advantages(rewards: Tensor, *, scale: str = "group", baseline: str = "mean", pass_at_k: int = 1) -> Tensor:
    """Advantages (P, G) of rewards (P, G): reward minus its group's baseline, over a scale.

    `scale`: the standard deviation (ddof = 1) of the group or of the whole batch, none, or the group's mean (MaxRL,
    arXiv 2602.02710), where a mean that is not positive gives 0. `baseline`: the mean of the group, or leave_one_out,
    that of its other completions (RLOO, arXiv 2402.14740). With `pass_at_k` above 1 the reward is the best of k.
    Groups of equal rewards give exactly zero.
    """
    size = rewards.shape[1]
    mean = rewards.mean(dim=1, keepdim=True)
    deviation = rewards.std(dim=1, keepdim=True) if scale == "group" and size > 1 else rewards.std()
    if pass_at_k > 1:
        rewards, mean, deviation, same = *best_of(rewards, pass_at_k), zero_variance(rewards)
    else:
        same = zero_variance(rewards)
    centred = (rewards - mean).masked_fill(same[:, None], 0.0)
    if size == 1:
        return centred
    if baseline == "leave_one_out":
        centred = centred * (size / (size - 1))  # r - mean of the others
    if scale == "mean":
        return torch.where(mean > 0, centred / mean, 0.0)
    return centred if scale == "none" else centred / (deviation + STD_EPSILON)


def best_of(rewards: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best reward of k of a group's completions, from rewards (P, G), over all choices of k.

    Its mean among choices with each completion (P, G), among all (P, 1), and its standard deviation (P, 1).

    For rewards of 0 and 1 this is the analytic advantage of pass@k training (arXiv 2508.10751).
    """
    size = rewards.shape[1]
    ordered, order = rewards.sort(dim=1)
    ranks, chosen = range(size), math.comb(size - 1, k - 1)
    best = rewards.new_tensor([math.comb(rank, k - 1) / math.comb(size, k) for rank in ranks])  # of any k
    own = rewards.new_tensor([math.comb(rank, k - 1) / chosen for rank in ranks])  # itself, among k with it
    other = rewards.new_tensor([math.comb(rank - 1, k - 2) / chosen if rank else 0.0 for rank in ranks])  # a better one
    mean = (ordered * best).sum(dim=1, keepdim=True)
    deviation = ((ordered - mean).square() * best).sum(dim=1, keepdim=True).sqrt()
    beyond = ordered * other
    values = ordered * own + beyond.flip(1).cumsum(1).flip(1) - beyond
    return values.gather(1, order.argsort(dim=1)), mean, deviation


def zero_variance(rewards: Tensor) -> Tensor:
    """(P,) boolean: groups of rewards (P, G) that are all equal and so have no gradient."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def overlong_penalty(length: int, *, soft_limit: int, max_new_tokens: int) -> float:
    """Soft overlong punishment of a completion of `length` tokens: equation 13 of DAPO (arXiv 2503.14476), negated.

    0 up to `soft_limit`, then (length - soft_limit) / (max_new_tokens - soft_limit): 1 at `max_new_tokens`. DAPO has
    L_max = max_new_tokens = 20,480 and L_max - L_cache = soft_limit = 16,384, and subtracts it from the reward.
    """
    return max(0, length - soft_limit) / (max_new_tokens - soft_limit)


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k3", ratio: Tensor | None = None
) -> Tensor:
    """Per-token estimate (B, T) of KL(policy || reference) from samples of the policy, with d = l_ref - l.

    "k1" is -d, "k2" d^2 / 2, "k3" Schulman's exp(d) - d - 1 (joschu.net/blog/kl-approx.html): unbiased, never negative.
    As a loss, the gradient of k1 is 0 on average, and k3's is biased; "k3_unbiased" multiplies k3 by the `ratio` of the
    policy loss, whose gradient is that of the KL (DeepSeek-V3.2, arXiv 2512.02556). "original" flips the sign of d, as
    in the original system; it does not estimate this KL.
    """
    difference = logprobs - ref_logprobs if estimator == "original" else ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    kl = difference.exp() - difference - 1
    return kl * ratio if estimator == "k3_unbiased" and ratio is not None else kl


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, loss: Loss) -> Tensor:
    """Ratio (B, T) of each token's probability to the old one; by sequence, the exponential of the mean of log-ratios.

    GSPO (arXiv 2507.18071) has one ratio per sequence.
    """
    log_ratio = logprobs - old_logprobs
    if loss.ratio_level == "sequence" or (loss.ratio_level == "auto" and loss.loss_type == "gspo"):
        log_ratio = ((log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)).expand_as(logprobs)
    return log_ratio.exp()


def policy_loss(logprobs: Tensor, ratio: Tensor, advantage: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Per-token loss (B, T) and which tokens were clipped (B, T), of log-probabilities (B, T) and advantages (B,).

    `cispo` (arXiv 2506.13585) weights log-probabilities by the detached ratio, capped at 1 + epsilon_high. With
    `dual_clip` (arXiv 1912.09729) a bad completion's ratio is capped too.
    """
    gain = advantage[:, None]
    if loss.loss_type == "cispo":
        capped = ratio.clamp(max=1 + loss.epsilon_high).detach()
        return -capped * gain * logprobs, (ratio > 1 + loss.epsilon_high) & (gain != 0)
    clipped = ratio.clamp(1 - loss.epsilon, 1 + loss.epsilon_high)
    is_clipped = clipped * gain < ratio * gain
    if loss.dual_clip:
        is_clipped = is_clipped | ((ratio > loss.dual_clip) & (gain < 0))
        ratio = ratio.clamp(max=loss.dual_clip)
    return -torch.minimum(ratio * gain, clipped * gain), is_clipped


def sampler_weight(old_logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, loss: Loss) -> Tensor:
    """Weights (B, T) of the policy loss that correct for a sampler which is another program than the trainer.

    The ratio of the trainer's probability to the sampler's, by token or by sequence (the product of its tokens'):
    truncated at `sampler_cap` (TIS, fengyao.notion.site/off-policy-rl), or 0 above it (as in IcePop, arXiv 2510.18855).
    """
    gap = (old_logprobs - sampled_logprobs) * mask
    if loss.sampler_level == "sequence":
        gap = gap.sum(dim=1, keepdim=True).expand_as(gap)
    ratio = gap.exp()
    if loss.sampler_correction == "mask":
        return ratio.masked_fill(ratio > loss.sampler_cap, 0.0)
    return ratio.clamp(max=loss.sampler_cap)


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
    return torch.full(lengths.shape, 1.0 / max(1, tokens))  # all completions may be masked


@dataclass(frozen=True)
class TokenLoss:
    """The loss of each token (B, T) before its normaliser, `value`, and what it consists of."""

    value: Tensor
    policy: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor | None


def batch_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    weight: Tensor,
    loss: Loss,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, TokenLoss]:
    """The rows' part of the step's loss, and that of each token: `token_weights` * policy + beta * kl.

    Log-probabilities, `mask` and `token_weights` of the policy loss are (B, T); advantages and the normaliser's
    `weight` (B,).
    """
    ratio = importance_ratio(logprobs, old_logprobs, mask, loss)
    policy, clipped = policy_loss(logprobs, ratio, advantage, loss)
    value, kl = policy if token_weights is None else policy * token_weights, None
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs, estimator=loss.kl_estimator, ratio=ratio)
        if loss.kl_in == "loss":
            value = value + loss.beta * kl
    return (value * mask * weight[:, None]).sum(), TokenLoss(value, policy, ratio, clipped, kl)
