"""One optimizer step: micro-batches, gradients, clipping, and what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial, reduce
from operator import add
from statistics import fmean

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.dist.ranks import Gradients, Passing, Solo
from grpo_cli.core.dist.shards import local, whole
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.grpo import Step, batch_loss, normalizer

IDLE = Sequences([[0]], [[0]], [0])  # what a rank reads in passes that others make


PROBED_WEIGHTS = 4096  # weights of each tensor that are compared before and after a step


def reference_logprobs(
    reference: Policy,
    sequences: Sequences,
    *,
    temperature: float,
    fit: MicroBatch | None = None,
    extra: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """The frozen reference's log-probabilities (B, T) of the completions.

    `poll` and `fit` as for `update`. `extra` passes of nothing are of use to the ranks of a sharded model alone.
    """
    chosen, fitting = range(len(sequences.completions)), fit or MicroBatch()

    def compute(at_once: int) -> Tensor:
        found = torch.zeros(sequences.mask().shape, device=reference.device)
        for rows in micro_batches(chosen, at_once):
            poll()
            chosen_rows = sequences.subset(rows)
            fitting.begin(tokens=chosen_rows.tokens, rows=len(rows))
            part, _ = reference.logprobs(chosen_rows, temperature=temperature)
            fitting.end()
            found[rows, : part.shape[1]] = part
        for _ in range(extra):
            reference.logprobs(IDLE, temperature=temperature)
        return found

    with torch.no_grad(), reference.brought():
        return fitting.attempt(compute, total=len(chosen), doing="reference pass")


def extra_passes(ranks: Solo, rows: Sequence[int], size: int) -> int:
    """How many passes other ranks of a sharded model have more than this one, with micro-batches of its rows."""
    passes = len(micro_batches(rows, size))
    return max(ranks.each(lambda: passes)) - passes


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows cut into lists of `size`, or all in one if `size` is 0."""
    size = size or max(1, len(rows))
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


@dataclass
class _Sums:
    """What the micro-batches of one pass add up to."""

    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0
    tokens: int = 0

    def add(self, loss: Tensor, kl: Tensor | None, entropy: Tensor, clipped: Tensor, mask: Tensor) -> None:
        self.loss += loss.item()
        self.kl += 0.0 if kl is None else float((kl.detach() * mask).sum())
        self.entropy += float((entropy * mask).sum())
        self.clipped += float((clipped & mask).sum())
        self.tokens += int(mask.sum())

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


class NotFinite(Passing):
    """The loss or the gradient of an update is not finite; the weights are what they were before it."""


class Diverged(NotFinite):
    """The weights are not finite after a step of the optimizer."""


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    advantage: Tensor,
    *,
    loss: Loss,
    temperature: float,
    max_new_tokens: int,
    num_inner_updates: int = 1,
    clip_grad_norm: float = 1.0,
    fit: MicroBatch | None = None,
    ref_logprobs: Tensor | None = None,
    sampled_logprobs: Sequence[Sequence[float]] | None = None,
    ranks: Solo | None = None,
    step: Step | None = None,
    poll: Callable[[], None] = lambda: None,
    stepping: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Update the weights `num_inner_updates` times from completions (B rows) and their advantages (B,).

    `fit` says how many rows make a micro-batch. `poll` is called before each one until the weights change; what it
    raises ends the update with the weights as they were. Without a KL term, rows without advantage are skipped: their
    gradient is exactly zero. `stepping` is entered around each step of the optimizer. Raises NotFinite, before the
    weights change, if the loss or the gradient is not finite, and Diverged if the weights are not after it.

    Of several `ranks` each is given its own completions of a `step`, if any; they add up their gradients, and then all
    of them move the weights alike.

    Returns the metrics loss, kl (if there is a reference), entropy, clip_fraction, grad_norm, weights_changed, means
    over the inner updates, and logprob_gap: the mean distance of l from the sampler's own log-probabilities, if they
    are given.
    """
    assert ref_logprobs is not None or loss.beta == 0
    ranks, fitting, extra = ranks or Solo(), fit or MicroBatch(), 0
    advantage = advantage.to(policy.device)
    matters = torch.ones(len(advantage), dtype=torch.bool) if loss.beta > 0 else (advantage != 0).cpu()
    rows: list[int] = matters.nonzero()[:, 0].tolist()
    lengths = torch.tensor([len(completion) for completion in sequences.completions])
    step = step or Step(len(lengths), int(lengths.sum()), teaches=bool(rows))
    weight = normalizer(lengths, loss_type=loss.loss_type, max_new_tokens=max_new_tokens, step=step).to(policy.device)
    old = torch.zeros(sequences.mask().shape, device=policy.device)  # (B, T), of the first inner update
    before = _probe(optimizer)
    history: list[dict[str, float]] = []
    gap = 0.0

    def gradient(gradients: Gradients, at_once: int) -> _Sums:
        """Leave the gradient of this rank's rows in the parameters; of all ranks' if the model is sharded."""
        gradients.begin()
        sums, batches = _Sums(), micro_batches(rows, at_once)
        for number, chosen in enumerate(batches, start=1):
            if not history and not policy.is_sharded:  # whose ranks cannot leave each other within a pass
                poll()
            part = sequences.subset(chosen)
            fitting.begin(tokens=part.tokens, rows=len(chosen))
            logprobs, entropy = policy.logprobs(part, temperature=temperature)
            mask = part.mask().to(policy.device)
            if not history:
                old[chosen, : mask.shape[1]] = logprobs.detach()
                if sampled_logprobs is not None:
                    sums.gap += _gap(logprobs.detach(), mask, [sampled_logprobs[row] for row in chosen])
            reference = None if ref_logprobs is None else ref_logprobs[chosen, : mask.shape[1]]
            total, clipped, kl = batch_loss(
                logprobs, old[chosen, : mask.shape[1]], reference, advantage[chosen], mask, weight[chosen], loss
            )
            if not policy.is_sharded:
                _require_finite(total, f"loss{ranks.of_rank}")
            if number == len(batches):
                gradients.ending()
            total.backward()
            fitting.end()
            sums.add(total, kl, entropy, clipped, mask)
        for _ in range(extra):  # takes part in the passes of ranks that have more rows
            (policy.logprobs(IDLE, temperature=temperature)[0].sum() * 0).backward()
        return sums

    try:
        for _ in range(num_inner_updates if step.teaches else 0):
            if policy.is_sharded:
                extra = extra_passes(ranks, rows, fitting.rows)
                own = Gradients(policy.model.parameters())  # the model itself adds up what its ranks leave
                parts = ranks.each(partial(gradient, own, fitting.rows))
            else:
                with ranks.gradients(policy.model.parameters()) as gradients:
                    attempt = partial(fitting.attempt, partial(gradient, gradients), total=len(rows), doing="update")
                    parts = ranks.each(partial(gradients.completed, attempt))
                    broken = gradients.add_up()
                if broken:
                    raise NotFinite(f"the gradient of {ranks.named(broken)} is not finite")
            sums = reduce(add, parts)
            with stepping():
                norm = whole(clip_gradients(list(policy.model.parameters()), clip_grad_norm))
                _require_finite(norm, "gradient norm")
                optimizer.step()
            finite = partial(all_finite, _learning(optimizer))
            if not (all(ranks.each(finite)) if policy.is_sharded else finite()):
                raise Diverged("the weights after the step are not finite")
            if not history:
                gap = sums.gap / sums.tokens
            history.append(_metrics(sums, norm, has_reference=ref_logprobs is not None))
    finally:
        optimizer.zero_grad(set_to_none=True)
    metrics = {key: sum(entry[key] for entry in history) / len(history) for key in history[0]} if history else {}
    if sampled_logprobs is not None and history:
        metrics["logprob_gap"] = gap
    changed = _changed(optimizer, before)
    if policy.is_sharded:
        changed = fmean(ranks.each(lambda: changed))
    return {**metrics, "weights_changed": changed}


def clip_gradients(weights: Sequence[torch.nn.Parameter], most: float) -> Tensor:
    """Scale gradients in place to a norm of at most `most`; returns their norm before, summed in float32."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(weights, most)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(weights, most, norm)
    return norm


def _metrics(sums: _Sums, norm: Tensor, *, has_reference: bool) -> dict[str, float]:
    metrics = {
        "loss": sums.loss,
        "entropy": sums.entropy / sums.tokens,
        "clip_fraction": sums.clipped / sums.tokens,
        "grad_norm": float(norm),
    }
    return {**metrics, "kl": sums.kl / sums.tokens} if has_reference else metrics


def _gap(logprobs: Tensor, mask: Tensor, sampled: Sequence[Sequence[float]]) -> float:
    """Sum of the distances of log-probabilities (B, T) from those of the sampler, of rows without padding."""
    values = torch.tensor([value for row in sampled for value in row], device=logprobs.device)
    return float((logprobs[mask] - values).abs().sum())


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element is a finite number, with one synchronization of the device."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _require_finite(value: Tensor, what: str) -> None:
    if not bool(torch.isfinite(value)):
        raise NotFinite(f"the {what} is not finite")


def _learning(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer moves: the weights, or their masters."""
    return [local(tensor.detach()) for group in optimizer.param_groups for tensor in group["params"]]


def _probe(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A copy of evenly spaced weights of every tensor."""
    flattened = (tensor.flatten() for tensor in _learning(optimizer))
    return [flat[:: max(1, flat.numel() // PROBED_WEIGHTS)].clone() for flat in flattened]


def _changed(optimizer: torch.optim.Optimizer, before: list[Tensor]) -> float:
    """Share of the probed weights that are no longer what they were, each tensor counted by its size."""
    sizes: list[int] = [tensor.numel() for tensor in _learning(optimizer)]
    shares = [
        float((old != new).float().mean()) if len(old) else 0.0
        for old, new in zip(before, _probe(optimizer), strict=True)
    ]
    return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
