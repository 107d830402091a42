"""What is measured about an update besides its loss: the share of changed weights, and the gap between log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.fsdp import local
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rollout.selfcheck import plain_logprobs
from grpo_cli.core.world import World

PROBED_WEIGHTS = 4096  # weights per tensor to compare before and after a step


class WeightProbe:
    """Evenly spaced weights of every tensor that an optimizer updates, copied when it is made."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._before = [part.clone() for part in self._probed()]

    def _probed(self) -> list[Tensor]:
        flattened = (tensor.flatten() for tensor in optimized(self._optimizer))
        return [flat[:: max(1, flat.numel() // PROBED_WEIGHTS)] for flat in flattened]

    def changed(self, world: World) -> float:
        """Share of weights that differ by now, each tensor weighted by its size; the mean over ranks."""
        sizes = [tensor.numel() for tensor in optimized(self._optimizer)]
        pairs = zip(self._before, self._probed(), strict=True)
        shares: list[float] = torch.stack([(old != new).float().mean() for old, new in pairs]).nan_to_num().tolist()
        return fmean(world.gather(sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)))


def optimized(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer updates: weights or masters; the local part of a shard."""
    return [local(tensor.detach()) for group in optimizer.param_groups for tensor in group["params"]]


@torch.no_grad()
def with_plain_logprobs(examples: Examples, policy: Policy, loss: Loss, *, temperature: float) -> Examples:
    """The examples with log-probs of the first and the last row with a gradient, by the model's own forward."""
    learning = examples.learning(loss).nonzero()[:, 0].tolist()
    ends = sorted({*learning[:1], *learning[-1:]})
    logprobs = plain_logprobs(policy, examples.sequences.subset(ends), temperature=temperature)
    return replace(examples, plain_logprobs=dict(zip(ends, logprobs, strict=True)))


def logprob_gap(plain: Tensor, trained: Tensor, sampled: Sequence[float]) -> float:
    """Sum over tokens of the distance from the `plain` log-probs (C,): the trainer's or the sampler's, the larger."""
    ours = torch.stack([trained[: len(plain)], torch.tensor(sampled, device=plain.device)])  # (2, C)
    return float((ours - plain).abs().amax(dim=0).sum())
