"""One update of the policy: gradients over micro-batches and ranks, clipping, the optimizer step, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial, reduce
from itertools import product
from operator import add
from statistics import fmean

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Loss, Train
from grpo_cli.core.fsdp import full, local
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.logprobs import scatter
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.diagnostics import WeightProbe, logprob_gap, optimized
from grpo_cli.core.rl.grpo import Step, TokenLoss, batch_loss, normalizer, sampler_weight
from grpo_cli.core.rl.observer import no_poll
from grpo_cli.core.world import World


@dataclass(frozen=True)
class Terms:
    """What a completion's tokens add to the step's loss in an inner update.

    `loss` = weight * (factor * policy + beta * kl) - bonus, with the sampler's correction and the choice by entropy in
    `factor`, and the entropy's `bonus`. `push` is the derivative of the update's loss with respect to the token's own
    logit, for d with respect to its log-probability d * (1 - probability): a certain token cannot be learned from.
    """

    old: list[float]  # log-probability before the step
    ratio: list[float]
    clipped: list[float]
    policy: list[float]
    factor: list[float]
    kl: list[float]
    weight: list[float]
    bonus: list[float]
    loss: list[float]
    push: list[float]

    @property
    def size(self) -> list[float]:
        """Of the push, whichever its direction."""
        return [abs(push) for push in self.push]

    @property
    def pull(self) -> list[float]:
        """Of the KL, before its beta."""
        return [weight * kl for weight, kl in zip(self.weight, self.kl, strict=True)]


Watch = Callable[[int, int, Terms], None]
"""Called with an inner update, a row, and its terms of the loss."""

DUMMY = Sequences([[0]], [[0]], [0])  # input of a dummy pass: with FSDP, all ranks make the same number of passes


class NotFinite(Exception):
    """The loss or the gradient is not finite; the weights have not changed since before the update."""


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
    num_mini_batches: int = 1

    @classmethod
    def of(cls, train: Train, loss: Loss) -> Objective:
        inner, parts = train.num_inner_updates, train.num_mini_batches
        return cls(loss, train.temperature, train.max_new_tokens, inner, train.clip_grad_norm, parts)

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether all log-probs and entropies are needed before the first gradient."""
        return self.num_mini_batches > 1 or self.loss.entropy_share < 1


def reference_logprobs(
    reference: Reference,
    sequences: Sequences,
    *,
    temperature: float,
    world: World | None = None,
    micro_batch: MicroBatch | None = None,
    poll: Callable[[], None] = no_poll,
) -> Tensor:
    """Log-probabilities (B, T) of the completions under the frozen reference. Other arguments as for `update`."""
    read = partial(reference.policy.logprobs, temperature=temperature, entropy="none")
    with reference.on_device():
        return _without_gradient(
            read, reference.policy, sequences, "reference pass", micro_batch or MicroBatch(), world or World(), poll
        )[0]


@torch.no_grad()
def _without_gradient(
    read: Callable[..., tuple[Tensor, Tensor]],
    policy: Policy,
    sequences: Sequences,
    doing: str,
    micro_batch: MicroBatch,
    world: World,
    poll: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) of all rows as `read` computes them, by micro-batches."""
    rows = range(len(sequences.completions))
    logprobs, entropies = torch.zeros(2, *sequences.mask().shape, device=policy.device)
    for attempt in micro_batch.attempts(len(rows), doing):
        with attempt:
            for some in _passes(rows, policy, micro_batch, world):
                poll()
                subset = sequences.subset(some) if some else DUMMY
                with micro_batch.watched(len(some)):
                    part, entropy = read(subset, logit_chunk=micro_batch.logit_chunk)
                if some:
                    logprobs[some, : part.shape[1]] = part
                    entropies[some, : part.shape[1]] = entropy
    return logprobs, entropies


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    objective: Objective,
    *,
    clock: Clock | None = None,
    micro_batch: MicroBatch | None = None,
    poll: Callable[[], None] = no_poll,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Update the weights `num_inner_updates` times for each mini-batch; returns metrics, means over all updates.

    Each rank passes its own `examples`. `clock` times the optimizer, and knows the ranks. `micro_batch` sets how many
    are computed at once. `poll` is called before each micro-batch of the first inner update; if it raises, the weights
    are unchanged. `watch` receives the terms of each row that has a gradient.

    Raises NotFinite on all ranks, before the weights change, if the loss or the gradient is not finite, and Diverged if
    the weights are not finite afterwards.
    """
    clock, micro_batch = clock or Clock(), micro_batch or MicroBatch()
    world, inputs = clock.world, _Inputs.of(policy, examples, objective)
    probe, history, covered = WeightProbe(optimizer), list[dict[str, float]](), 0
    try:
        if objective.needs_old_logprobs:
            _record_old_logprobs(inputs, micro_batch, world, poll)
        for number, part in product(range(objective.num_inner_updates), inputs.parts()):
            # 1. Sum gradients over micro-batches and ranks.
            sums = _accumulate(inputs, part, optimizer, micro_batch, world, poll=poll, number=number, watch=watch)
            # 2. Clip them, and step.
            norm, has_gradient = torch.zeros(()), inputs.step.has_gradient
            if objective.num_mini_batches > 1:
                has_gradient = any(world.gather(bool(part.learning)))
            if has_gradient:
                with clock.phase("optimizer"):
                    norm = optimizer_step(policy, optimizer, sums.loss, objective.clip_grad_norm, world)
            # 3. Describe the step.
            covered += sums.tokens
            history.append(sums.means(norm, has_kl=examples.ref_logprobs is not None))
            if not inputs.step.has_gradient:
                break
    finally:
        optimizer.zero_grad(set_to_none=True)
    means = {key: fmean(entry[key] for entry in history if key in entry) for key in history[0]}
    whole = inputs.step.tokens * len(history) / objective.num_mini_batches
    share = {} if objective.loss.mask_truncated else {"loss_tokens": covered / whole}
    return {**means, **share, "weights_changed": probe.changed(world)}


def _accumulate(
    inputs: _Inputs,
    part: Part,
    optimizer: torch.optim.Optimizer,
    micro_batch: MicroBatch,
    world: World,
    *,
    poll: Callable[[], None],
    number: int,
    watch: Watch | None,
) -> Sums:
    """Set this rank's gradients in inner update `number`, by micro-batches; returns the sums of all ranks."""
    for attempt in micro_batch.attempts(len(part.learning), "update"):
        with attempt:
            optimizer.zero_grad(set_to_none=True)
            sums = Sums()
            for rows in _passes(part.learning, inputs.policy, micro_batch, world):
                if number == 0:
                    poll()
                sums += _backward(inputs, rows, micro_batch, number, watch)
            for rows in _passes(part.without_gradient, inputs.policy, micro_batch, world):
                sums += _entropy(inputs, rows, micro_batch)
    return reduce(add, world.gather(sums))


def optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, loss: float, max_norm: float, world: World
) -> Tensor:
    """Sum gradients over ranks, clip them to a norm of at most `max_norm`, step; returns the norm before clipping.

    Raises NotFinite, before the weights change, if `loss` or the norm is not finite, and Diverged if the weights are
    not finite afterwards.
    """
    if not policy.is_sharded:  # FSDP sums gradients itself
        world.sum_gradients(policy.trainable)
    norm = full(clip_gradients(policy.trainable, max_norm))
    if not torch.isfinite(torch.tensor(loss)):
        raise NotFinite("the loss is not finite")
    if not bool(torch.isfinite(norm)):
        raise NotFinite("the gradient norm is not finite")
    optimizer.step()
    if not all(world.gather(all_finite([local(weight.detach()) for weight in optimized(optimizer)]))):
        raise Diverged("the weights after the step are not finite")
    return norm


def _passes(rows: Sequence[int], policy: Policy, micro_batch: MicroBatch, world: World) -> list[list[int]]:
    """The micro-batches of this rank; with sharded weights, padded with empty ones to the largest count of any rank."""
    own = micro_batch.split(rows)
    count = max(world.gather(len(own))) if policy.is_sharded else len(own)
    return own + [[]] * (count - len(own))


@dataclass(frozen=True)
class Part:
    """The rows of a mini-batch. Of those without a gradient, only the entropy is computed."""

    learning: list[int]
    without_gradient: list[int]


@dataclass
class _Inputs:
    """This rank's part of a step, on the policy's device."""

    policy: Policy
    examples: Examples
    objective: Objective
    step: Step
    advantages: Tensor  # (B,)
    weight: Tensor  # (B,) of each token of a row in the loss
    old_logprobs: Tensor  # (B, T), filled by the first inner update, or before it if the objective needs them
    sampled_logprobs: Tensor | None  # (B, T)
    learning: list[int]  # rows with a gradient
    without_gradient: list[int]  # rows of zero advantage and no KL, or masked
    entropic: Tensor | None  # (B, T) boolean: tokens whose entropy lets them learn; None: all
    learned_tokens: int  # of all ranks; the entropy bonus is their mean
    masked: list[int]  # truncated rows that are left out

    @classmethod
    def of(cls, policy: Policy, examples: Examples, objective: Objective) -> _Inputs:
        device, loss = policy.device, objective.loss
        assert examples.ref_logprobs is not None or loss.beta == 0
        lengths = torch.tensor([len(completion) for completion in examples.sequences.completions])
        masked, learns = examples.masked(loss), examples.learning(loss)
        learning, without_gradient = (rows.nonzero()[:, 0].tolist() for rows in (learns, ~learns))
        step = examples.step or Step(len(lengths), int(lengths[~masked].sum()), has_gradient=bool(learning))
        weight = normalizer(lengths, loss_type=loss.loss_type, max_new_tokens=objective.max_new_tokens, step=step)
        old_logprobs, sampled = torch.zeros(examples.sequences.mask().shape, device=device), None
        if examples.sampled_logprobs:
            flat = torch.tensor([value for row in examples.sampled_logprobs for value in row])
            sampled = scatter(flat, lengths.tolist(), range(len(lengths))).to(device)
        return cls(
            policy,
            examples,
            objective,
            step,
            advantages=examples.advantages.to(device),
            weight=weight.to(device) * objective.num_mini_batches,
            old_logprobs=old_logprobs,
            sampled_logprobs=sampled,
            learning=learning,
            without_gradient=without_gradient,
            entropic=None,
            learned_tokens=step.tokens,
            masked=masked.nonzero()[:, 0].tolist(),
        )

    def parts(self) -> list[Part]:
        """The mini-batches, in the order of their prompts."""
        count, owners = self.objective.num_mini_batches, self.examples.sequences.prompt_index
        prompts = max(owners, default=0) + 1

        def split(rows: list[int]) -> list[list[int]]:
            return [[row for row in rows if owners[row] * count // prompts == part] for part in range(count)]

        return [Part(*rows) for rows in zip(split(self.learning), split(self.without_gradient), strict=True)]

    def bonus(self, rows: list[int], entropy: Tensor, mask: Tensor) -> Tensor:
        """The entropy bonus (B, T) of these rows: its weight times the mean entropy of the tokens that learn."""
        chosen = mask if self.entropic is None else self.entropic[rows, : mask.shape[1]]
        weight = self.objective.loss.entropy_bonus * self.objective.num_mini_batches / max(1, self.learned_tokens)
        return weight * entropy * chosen

    def token_weights(self, rows: list[int], mask: Tensor) -> Tensor | None:
        """Weights (B, T) of these rows' policy loss, by the sampler's correction and by entropy; None if all are 1."""
        loss, length, weights = self.objective.loss, mask.shape[1], None
        if loss.sampler_correction in ("truncate", "mask") and self.sampled_logprobs is not None:
            old, sampled = (part[rows, :length] for part in (self.old_logprobs, self.sampled_logprobs))
            weights = sampler_weight(old, sampled, mask, loss)
        if self.entropic is not None:
            chosen = self.entropic[rows, :length].float()
            weights = chosen if weights is None else weights * chosen
        return weights


def _backward(
    inputs: _Inputs, rows: list[int], micro_batch: MicroBatch, number: int, watch: Watch | None = None
) -> Sums:
    """Add the gradient of these rows' part of the loss in an inner update; an empty list makes a dummy pass."""
    policy, examples, objective, is_first = inputs.policy, inputs.examples, inputs.objective, number == 0
    if not rows:
        (policy.logprobs(DUMMY, temperature=1.0)[0].sum() * 0).backward()
        return Sums()
    sequences = examples.sequences.subset(rows)
    with micro_batch.watched(len(rows)):
        logprobs, entropy = policy.logprobs(
            sequences,
            temperature=objective.temperature,
            entropy="gradient" if objective.loss.entropy_bonus else "value",
            logit_chunk=micro_batch.logit_chunk,
        )
        mask = sequences.mask().to(policy.device)  # (B, T)
        length = mask.shape[1]
        if is_first and not objective.needs_old_logprobs:
            inputs.old_logprobs[rows, :length] = logprobs.detach()
        total, tokens = batch_loss(
            logprobs,
            inputs.old_logprobs[rows, :length],
            None if examples.ref_logprobs is None else examples.ref_logprobs[rows, :length],
            inputs.advantages[rows],
            mask,
            inputs.weight[rows],
            objective.loss,
            inputs.token_weights(rows, mask),
        )
        if objective.loss.entropy_bonus:
            total = total - inputs.bonus(rows, entropy, mask).sum()
        if watch:
            logprobs.retain_grad()
        total.backward()
    if watch:
        for row, terms in zip(rows, _terms(inputs, rows, logprobs, entropy, tokens, mask), strict=True):
            watch(number, row, terms)
    sums = Sums.of(total.detach(), tokens, entropy.detach(), mask)
    if inputs.sampled_logprobs is not None and is_first:
        sampled = inputs.sampled_logprobs[rows, :length]
        sums.sampler_gap = float(((inputs.old_logprobs[rows, :length] - sampled).abs() * mask).sum())
    for row in examples.plain_logprobs.keys() & rows if is_first else ():
        trained = logprobs[rows.index(row)].detach()
        sums.gap += logprob_gap(examples.plain_logprobs[row], trained, examples.sampled_logprobs[row])
        sums.compared += len(examples.plain_logprobs[row])
    return sums


@torch.no_grad()
def _terms(
    inputs: _Inputs, rows: list[int], logprobs: Tensor, entropy: Tensor, tokens: TokenLoss, mask: Tensor
) -> list[Terms]:
    """The terms of each row after the backward pass, those of a mini-batch as a part of the step's."""
    weight, bonus = mask * inputs.weight[rows][:, None], inputs.bonus(rows, entropy, mask)
    factor, count, chance = inputs.token_weights(rows, mask), inputs.objective.num_mini_batches, logprobs.exp()
    assert logprobs.grad is not None
    # The derivative of the entropy with respect to the token's own logit is -chance * (logprob + entropy).
    push = logprobs.grad * (1 - chance) + inputs.bonus(rows, chance * (logprobs + entropy), mask)
    columns = [
        inputs.old_logprobs[rows, : mask.shape[1]],
        tokens.ratio,
        tokens.clipped,
        tokens.policy,
        torch.ones_like(weight) if factor is None else factor,
        torch.zeros_like(weight) if tokens.kl is None else tokens.kl,
        weight / count,
        bonus / count,
        (tokens.value * weight - bonus) / count,
        push,
    ]
    lengths = [len(inputs.examples.sequences.completions[row]) for row in rows]
    return [
        Terms(*(column[index, :length].float().tolist() for column in columns)) for index, length in enumerate(lengths)
    ]


def _record_old_logprobs(inputs: _Inputs, micro_batch: MicroBatch, world: World, poll: Callable[[], None]) -> None:
    """Compute the log-probs of all rows before the weights change, and choose the tokens that learn by entropy."""
    policy, objective, sequences = inputs.policy, inputs.objective, inputs.examples.sequences
    read = partial(policy.logprobs, temperature=objective.temperature)
    inputs.old_logprobs, entropies = _without_gradient(read, policy, sequences, "update", micro_batch, world, poll)
    if objective.loss.entropy_share < 1:
        mask = sequences.mask().to(policy.device)
        mask[inputs.masked] = False
        everywhere = torch.cat(world.gather(entropies[mask].cpu()))
        threshold = float(torch.quantile(everywhere, 1 - objective.loss.entropy_share)) if len(everywhere) else 0.0
        inputs.entropic = mask & (entropies >= threshold)
        inputs.learned_tokens = sum(world.gather(int(inputs.entropic.sum())))


@torch.no_grad()
def _entropy(inputs: _Inputs, rows: list[int], micro_batch: MicroBatch) -> Sums:
    """The entropy of rows without a gradient, so that it does not depend on the loss; none for a dummy pass."""
    sequences = inputs.examples.sequences.subset(rows) if rows else DUMMY
    with micro_batch.watched(len(rows)):
        _, entropy = inputs.policy.logprobs(
            sequences, temperature=inputs.objective.temperature, logit_chunk=micro_batch.logit_chunk
        )
    mask = sequences.mask().to(entropy.device)
    return Sums(entropy=float((entropy * mask).sum()), tokens=int(mask.sum())) if rows else Sums()


@dataclass
class Sums:
    """Sums over the tokens of a pass, for its metrics."""

    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0
    compared: int = 0  # number of tokens in the gap
    sampler_gap: float = 0.0
    learned: int = 0  # tokens of rows with a gradient
    tokens: int = 0

    @classmethod
    def of(cls, loss: Tensor, parts: TokenLoss, entropy: Tensor, mask: Tensor) -> Sums:
        return cls(
            loss=loss.item(),
            kl=0.0 if parts.kl is None else float((parts.kl.detach() * mask).sum()),
            entropy=float((entropy * mask).sum()),
            clipped=float((parts.clipped & mask).sum()),
            tokens=int(mask.sum()),
            learned=int(mask.sum()),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def means(self, norm: Tensor, *, has_kl: bool) -> dict[str, float]:
        """The metrics of an inner update, `logprob_gap` among them if it was measured."""
        metrics = {
            "loss": self.loss,
            "entropy": self.entropy / self.tokens,
            "clip_fraction": self.clipped / self.tokens,
            "grad_norm": float(norm),
        }
        gap = {"logprob_gap": self.gap / self.compared} if self.compared else {}
        gap |= {"sampler_gap": self.sampler_gap / self.learned} if self.sampler_gap else {}
        return metrics | ({"kl": self.kl / self.tokens} if has_kl else {}) | gap


def clip_gradients(weights: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a norm of at most `max_norm`; returns the norm before, summed in float32."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(weights, max_norm)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    return norm


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements are finite, with one device synchronization."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())
