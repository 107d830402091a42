"""How a training is spread over ranks: replicated weights or sharded weights.

Encapsulates the differences within a training step: matching passes across ranks, summing gradients, and publishing
weights to the sampler. Independent of the algorithm and of files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from grpo_cli.core.dist.ranks import Gradients, Passing, Solo
from grpo_cli.core.dist.shards import gather
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy, Sequences

T = TypeVar("T")
DUMMY = Sequences([[0]], [[0]], [0])  # input of a dummy forward pass


class NotFinite(Passing):
    """The loss or the gradient is not finite; the weights have not changed since before the update."""


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Split rows into lists of `size`; 0 puts all of them in one."""
    size = size or max(1, len(rows))
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


class Replicated:
    """Every rank holds all weights and gradients are summed over ranks. Also used for a single process."""

    def __init__(self, policy: Policy, ranks: Solo | None = None) -> None:
        self.policy = policy  # samples
        self.learner = policy  # is trained
        self.ranks = ranks or Solo()

    def interruptible(self, poll: Callable[[], None]) -> Callable[[], None]:
        """`poll`, if a rank may leave between two passes; else a no-op."""
        return poll

    def forward(self, model: Policy, compute: Callable[[int], T], rows: Sequence[int], fit: MicroBatch) -> T:
        """This rank's result of `compute`, which makes forward passes over `rows` in micro-batches of a given size."""
        return self.ranks.own(lambda: fit.attempt(compute, total=len(rows), doing="reference pass"))

    def backward(self, compute: Callable[[Gradients, int], T], rows: Sequence[int], fit: MicroBatch) -> list[T]:
        """Every rank's result of `compute`, which makes backward passes; gradients are summed over ranks.

        Raises NotFinite if a rank's gradients are not finite, before they are summed into any weight.
        """
        with self.ranks.gradients(self.learner.trainable) as gradients:
            attempt = partial(fit.attempt, partial(compute, gradients), total=len(rows), doing="update")
            results = self.ranks.each(partial(gradients.completed, attempt))
            broken = gradients.add_up()
        if broken:
            raise NotFinite(f"the gradient of {self.ranks.named(broken)} is not finite")
        return results

    def require_finite_loss(self, loss: Tensor) -> None:
        """Raise NotFinite, naming this rank, before a backward pass."""
        if not bool(torch.isfinite(loss)):
            raise NotFinite(f"the loss{self.ranks.of_rank} is not finite")

    def mean(self, value: float) -> float:
        """Mean over the shards of the model."""
        return value

    def every(self, holds: Callable[[], bool]) -> bool:
        """Whether a condition holds on all shards of the model."""
        return holds()

    def publish(self) -> None:
        """Make updated weights available for sampling."""

    def check_equal(self) -> None:
        """Raise CountdownError unless all ranks have the same weights."""
        if any(other != sums for sums, other in pairwise(self.ranks.each(self.policy.sums))):
            raise CountdownError("the ranks no longer have the same weights", "resume with `--resume`", exit_code=1)


class Sharded(Replicated):
    """Every rank trains its shard with FSDP and samples from a full copy of the weights.

    All ranks make the same number of passes: a rank with fewer micro-batches makes dummy passes.
    """

    def __init__(self, policy: Policy, learner: Policy, ranks: Solo) -> None:
        super().__init__(policy, ranks)
        self.learner = learner

    def interruptible(self, poll: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def forward(self, model: Policy, compute: Callable[[int], T], rows: Sequence[int], fit: MicroBatch) -> T:
        dummies = self._dummies(rows, fit)

        def in_step(size: int) -> T:
            result = compute(size)
            for _ in range(dummies):
                model.logprobs(DUMMY, temperature=1.0)
            return result

        return self.ranks.own(lambda: fit.attempt(in_step, total=len(rows), doing="reference pass"))

    def backward(self, compute: Callable[[Gradients, int], T], rows: Sequence[int], fit: MicroBatch) -> list[T]:
        dummies = self._dummies(rows, fit)
        gradients = Gradients(self.learner.model.parameters())  # FSDP sums them itself

        def in_step() -> T:
            result = compute(gradients, fit.rows)
            for _ in range(dummies):
                (self.learner.logprobs(DUMMY, temperature=1.0)[0].sum() * 0).backward()
            return result

        return self.ranks.each(in_step)

    def require_finite_loss(self, loss: Tensor) -> None:
        """A no-op: a rank cannot leave the others within a pass, so the gradient norm is checked instead."""

    def mean(self, value: float) -> float:
        return fmean(self.ranks.each(lambda: value))

    def every(self, holds: Callable[[], bool]) -> bool:
        return all(self.ranks.each(holds))

    def publish(self) -> None:
        gather(self.learner, self.policy)

    def _dummies(self, rows: Sequence[int], fit: MicroBatch) -> int:
        passes = len(micro_batches(rows, fit.rows))
        return max(self.ranks.each(lambda: passes)) - passes


def parallel(policy: Policy, learner: Policy | None, ranks: Solo) -> Replicated:
    """Sharded if `learner` is a sharded version of `policy`, else Replicated."""
    return Sharded(policy, learner, ranks) if learner else Replicated(policy, ranks)
