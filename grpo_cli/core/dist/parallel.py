"""How a training is spread over ranks: every rank holds all weights, or a shard of them.

The only place where the two differ for a training step: passes in step with other ranks, sums of gradients, and copies
of the weights to sample from. Knows neither the algorithm nor files.
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
DUMMY = Sequences([[0]], [[0]], [0])  # input of a forward pass whose result nobody needs


class NotFinite(Passing):
    """The loss or the gradient is not finite; the weights are what they were before the update."""


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows in lists of `size`; 0 puts all of them in one."""
    size = size or max(1, len(rows))
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


class Replicated:
    """Every rank holds all weights, and they sum their gradients. One process is the simplest case."""

    def __init__(self, policy: Policy, ranks: Solo | None = None) -> None:
        self.policy = policy  # samples
        self.learner = policy  # is trained
        self.ranks = ranks or Solo()

    def interruptible(self, poll: Callable[[], None]) -> Callable[[], None]:
        """`poll` if one rank may leave between two passes."""
        return poll

    def forward(self, model: Policy, compute: Callable[[int], T], rows: Sequence[int], fit: MicroBatch) -> T:
        """This rank's result of `compute`, which makes forward passes over `rows` in micro-batches of a given size."""
        return self.ranks.own(lambda: fit.attempt(compute, total=len(rows), doing="reference pass"))

    def backward(self, compute: Callable[[Gradients, int], T], rows: Sequence[int], fit: MicroBatch) -> list[T]:
        """Every rank's result of `compute`, which makes backward passes; gradients are summed over the ranks.

        Raises NotFinite, before they are summed into any weight, where a rank's gradients are not finite.
        """
        with self.ranks.gradients(self.learner.trainable) as gradients:
            attempt = partial(fit.attempt, partial(compute, gradients), total=len(rows), doing="update")
            results = self.ranks.each(partial(gradients.completed, attempt))
            broken = gradients.add_up()
        if broken:
            raise NotFinite(f"the gradient of {self.ranks.named(broken)} is not finite")
        return results

    def require_finite_loss(self, loss: Tensor) -> None:
        """Raise NotFinite, which names this rank, before a backward pass."""
        if not bool(torch.isfinite(loss)):
            raise NotFinite(f"the loss{self.ranks.of_rank} is not finite")

    def mean(self, value: float) -> float:
        """Mean over the shards of the model."""
        return value

    def every(self, holds: Callable[[], bool]) -> bool:
        """Whether a condition holds for all shards of the model."""
        return holds()

    def publish(self) -> None:
        """Make updated weights available for sampling."""

    def check_equal(self) -> None:
        """Raise CountdownError unless all ranks have the same weights."""
        if any(other != sums for sums, other in pairwise(self.ranks.each(self.policy.sums))):
            raise CountdownError("the ranks no longer have the same weights", "resume with `--resume`", exit_code=1)


class Sharded(Replicated):
    """Every rank trains its shard with FSDP, and samples from a whole copy of the weights.

    All ranks make the same number of passes: one with fewer micro-batches makes dummy passes.
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
        """A rank cannot leave the others within a pass: the norm of the gradients is checked instead."""

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
    """The way a training is spread: sharded if `learner` is a sharded version of `policy`."""
    return Sharded(policy, learner, ranks) if learner else Replicated(policy, ranks)
