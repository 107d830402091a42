"""One optimizer step: gradients over micro-batches, clipping, the step, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.dist.parallel import NotFinite, Replicated, micro_batches
from grpo_cli.core.dist.ranks import Gradients
from grpo_cli.core.dist.shards import local, whole
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.grpo import Step, batch_loss, normalizer
from grpo_cli.core.sampling.selfcheck import plain_logprobs

PROBED_WEIGHTS = 4096  # weights per tensor to compare before and after a step


class Diverged(NotFinite):
    """The weights are not finite after an optimizer step."""


@dataclass(frozen=True)
class Objective:
    """The loss and the number of updates. `max_new_tokens` is the normaliser of `dr_grpo`."""

    loss: Loss
    temperature: float
    max_new_tokens: int
    num_inner_updates: int = 1
    clip_grad_norm: float = 1.0


def reference_logprobs(
    reference: Reference,
    sequences: Sequences,
    *,
    temperature: float,
    parallel: Replicated | None = None,
    fit: MicroBatch | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """Log-probabilities (B, T) of the completions under the frozen reference. `fit` and `poll` as for `update`."""
    policy, fit, rows = reference.policy, fit or MicroBatch(), range(len(sequences.completions))
    parallel = parallel or Replicated(policy)
    poll = parallel.interruptible(poll)

    def compute(size: int) -> Tensor:
        logprobs = torch.zeros(sequences.mask().shape, device=policy.device)
        for chosen in micro_batches(rows, size):
            poll()
            subset = sequences.subset(chosen)
            fit.begin(tokens=subset.tokens, rows=len(chosen))
            part, _ = policy.logprobs(subset, temperature=temperature, entropy=False, logit_chunk=fit.logit_chunk)
            fit.end()
            logprobs[chosen, : part.shape[1]] = part
        return logprobs

    with torch.no_grad(), reference.on_device():
        return parallel.forward(policy, compute, rows, fit)


def update(
    parallel: Replicated,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    objective: Objective,
    *,
    fit: MicroBatch | None = None,
    poll: Callable[[], None] = lambda: None,
    stepping: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Update the weights `num_inner_updates` times; returns metrics, means over the inner updates.

    `fit` sets the micro-batch size. `poll` is called before each micro-batch until the weights change; an exception it
    raises leaves them unchanged. `stepping` wraps each optimizer step. Without a KL term, rows of zero advantage are
    skipped: their gradient is exactly zero. Raises NotFinite, before the weights change, if the loss or the gradient is
    not finite, and Diverged if the weights are not finite afterwards. With `sampled_logprobs`, two rows of each rank
    are compared with the model's own forward.
    """
    fit = fit or MicroBatch()
    passes = _Passes(parallel, examples, objective, fit, poll)
    weights, before = parallel.learner.trainable, _probe(optimizer)
    history: list[dict[str, float]] = []
    gap: dict[str, float] = {}
    try:
        for number in range(objective.num_inner_updates if passes.step.teaches else 0):
            # 1. Sum gradients over micro-batches and ranks.
            passes.is_first = number == 0
            sums = reduce(add, parallel.backward(passes.accumulate, passes.rows, fit))
            # 2. Clip them, and step.
            with stepping():
                norm = whole(clip_gradients(weights, objective.clip_grad_norm))
                if not bool(torch.isfinite(norm)):
                    raise NotFinite("the gradient norm is not finite")
                optimizer.step()
            if not parallel.every(partial(all_finite, _trained(optimizer))):
                raise Diverged("the weights after the step are not finite")
            # 3. Describe the step.
            history.append(sums.means(norm, has_kl=examples.ref_logprobs is not None))
            if sums.compared:
                gap = {"logprob_gap": sums.gap / sums.compared}
    finally:
        optimizer.zero_grad(set_to_none=True)
    means = {key: sum(entry[key] for entry in history) / len(history) for key in history[0]} if history else {}
    return {**means, **gap, "weights_changed": parallel.mean(_changed(optimizer, before))}


class _Passes:
    """The forward and backward passes over this rank's rows."""

    def __init__(
        self,
        parallel: Replicated,
        examples: Examples,
        objective: Objective,
        fit: MicroBatch,
        poll: Callable[[], None],
    ) -> None:
        self.parallel, self.policy, self.examples, self.objective = parallel, parallel.learner, examples, objective
        self.fit, self.poll = fit, parallel.interruptible(poll)
        loss, device = objective.loss, self.policy.device
        assert examples.ref_logprobs is not None or loss.beta == 0
        self.advantages = examples.advantages.to(device)  # (B,)
        matters = torch.ones(len(self.advantages), dtype=torch.bool) if loss.beta > 0 else (self.advantages != 0).cpu()
        self.rows: list[int] = matters.nonzero()[:, 0].tolist()
        lengths = torch.tensor([len(completion) for completion in examples.sequences.completions])
        self.step = examples.step or Step(len(lengths), int(lengths.sum()), teaches=bool(self.rows))
        self.weight = normalizer(
            lengths, loss_type=loss.loss_type, max_new_tokens=objective.max_new_tokens, step=self.step
        ).to(device)  # (B,)
        self.old_logprobs = torch.zeros(examples.sequences.mask().shape, device=device)  # (B, T)
        self.is_first = True  # the first inner update provides the old log-probs of later ones
        self.plain: dict[int, Tensor] = {}  # rows' log-probs (C,) by the model's own forward, in the first inner update

    def accumulate(self, gradients: Gradients, size: int) -> _Sums:
        """Accumulate the gradient of this rank's rows, `size` rows at a time."""
        self.plain = self._plain_logprobs() if self.is_first and self.examples.sampled_logprobs is not None else {}
        gradients.begin()
        sums, batches = _Sums(), micro_batches(self.rows, size)
        for number, rows in enumerate(batches, start=1):
            if self.is_first:
                self.poll()
            total = self._loss(rows, sums)
            if number == len(batches):
                gradients.ending()
            total.backward()
            self.fit.end()
        return sums

    @torch.no_grad()
    def _plain_logprobs(self) -> dict[int, Tensor]:
        """Log-probabilities of this rank's first and last row by the model's own forward."""
        rows = sorted({*self.rows[:1], *self.rows[-1:]})
        compared = self.examples.sequences.subset(rows)
        logprobs = plain_logprobs(self.parallel.policy, compared, temperature=self.objective.temperature)
        return dict(zip(rows, logprobs, strict=True))

    def _loss(self, rows: list[int], sums: _Sums) -> Tensor:
        """These rows' part of the step's loss."""
        examples, objective = self.examples, self.objective
        sequences = examples.sequences.subset(rows)
        self.fit.begin(tokens=sequences.tokens, rows=len(rows), adds=self.policy.missing_gradients())
        logprobs, entropy = self.policy.logprobs(
            sequences, temperature=objective.temperature, logit_chunk=self.fit.logit_chunk
        )
        mask = sequences.mask().to(self.policy.device)
        length = mask.shape[1]
        if self.is_first:
            self.old_logprobs[rows, :length] = logprobs.detach()
        reference = None if examples.ref_logprobs is None else examples.ref_logprobs[rows, :length]
        old, advantages, weight = self.old_logprobs[rows, :length], self.advantages[rows], self.weight[rows]
        total, clipped, kl = batch_loss(logprobs, old, reference, advantages, mask, weight, objective.loss)
        self.parallel.require_finite_loss(total)
        for row in self.plain.keys() & rows:
            assert examples.sampled_logprobs is not None
            sums.compare(self.plain[row], logprobs[rows.index(row)].detach(), examples.sampled_logprobs[row])
        sums.add(total, kl, entropy, clipped, mask)
        return total


@dataclass
class _Sums:
    """Sums over the tokens of a pass, for its metrics."""

    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0
    compared: int = 0  # number of tokens in the gap
    tokens: int = 0

    def add(self, loss: Tensor, kl: Tensor | None, entropy: Tensor, clipped: Tensor, mask: Tensor) -> None:
        self.loss += loss.item()
        self.kl += 0.0 if kl is None else float((kl.detach() * mask).sum())
        self.entropy += float((entropy * mask).sum())
        self.clipped += float((clipped & mask).sum())
        self.tokens += int(mask.sum())

    def compare(self, plain: Tensor, trained: Tensor, sampled: Sequence[float]) -> None:
        """Add a row's distances from its plain log-probs (C,), per token the larger of trained and sampled."""
        ours = torch.stack([trained[: len(plain)], torch.tensor(sampled, device=plain.device)])  # (2, C)
        self.gap += float((ours - plain).abs().amax(dim=0).sum())
        self.compared += len(plain)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def means(self, norm: Tensor, *, has_kl: bool) -> dict[str, float]:
        metrics = {
            "loss": self.loss,
            "entropy": self.entropy / self.tokens,
            "clip_fraction": self.clipped / self.tokens,
            "grad_norm": float(norm),
        }
        return {**metrics, "kl": self.kl / self.tokens} if has_kl else metrics


def clip_gradients(weights: Sequence[torch.nn.Parameter], most: float) -> Tensor:
    """Scale gradients in place to a norm of at most `most`; returns the norm before, summed in float32."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(weights, most)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(weights, most, norm)
    return norm


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements are finite, with one device synchronization."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer updates: weights or masters; the local part of a shard."""
    return [local(tensor.detach()) for group in optimizer.param_groups for tensor in group["params"]]


def _probed(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Evenly spaced weights of every tensor."""
    flattened = (tensor.flatten() for tensor in _trained(optimizer))
    return [flat[:: max(1, flat.numel() // PROBED_WEIGHTS)] for flat in flattened]


def _probe(optimizer: torch.optim.Optimizer) -> Tensor:
    """A copy of evenly spaced weights of every tensor, concatenated."""
    return torch.cat(_probed(optimizer))


def _changed(optimizer: torch.optim.Optimizer, before: Tensor) -> float:
    """Share of weights that differ from the probe, each tensor weighted by its size; one synchronization."""
    sizes: list[int] = [tensor.numel() for tensor in _trained(optimizer)]
    lengths = torch.tensor([len(part) for part in _probed(optimizer)], device=before.device)
    counts = torch.cat([lengths.new_zeros(1), (before != _probe(optimizer)).cumsum(dim=0)])
    ends = lengths.cumsum(dim=0)
    shares: list[float] = ((counts[ends] - counts[ends - lengths]) / lengths.clamp(min=1)).tolist()
    return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
