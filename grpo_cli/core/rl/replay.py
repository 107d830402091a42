"""Replay a step of a run: take it again from the nearest earlier checkpoint, or from the start, and record it.

The samples of a step are a function of (seed, step, weights), so the replay is checked against the logged metrics:
equal bit for bit on the same CPU with as many threads. Nothing in the run changes, except that a finished replay is
kept there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_cli.core.config.resolve import restore
from grpo_cli.core.config.settings import Loss
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.batch import Batch, Group
from grpo_cli.core.rl.build import build
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.explain import OWN, Fork, Terms, fork, terms, variants
from grpo_cli.core.rl.grpo import Step, normalizer
from grpo_cli.core.rl.observer import Observer
from grpo_cli.core.rl.train import StepResult, Trainer, corrected
from grpo_cli.core.rl.update import reference_logprobs
from grpo_cli.core.run.folder import Run

CHECKED = ("reward", "accuracy", "completion_length", "entropy", "loss", "kl", "grad_norm")  # metrics to compare

CHUNK = 2**24  # elements of a gradient in double precision


@dataclass(frozen=True)
class Plan:
    """What must be computed: the steps after checkpoint `start`, 0 for the starting model, up to `step`."""

    step: int
    start: int
    seconds: float  # that these steps took in the training


@dataclass(frozen=True)
class Completion:
    """A completion with its tokens, and their log-probabilities at each stage; `updates`: of each inner update.

    `after` is the policy's after the step, `last` that of the run's last checkpoint.
    """

    text: str
    tokens: list[int]
    pieces: list[str]
    reward: float
    parts: dict[str, float]
    advantage: float
    reason: str
    truncated: bool
    sampled: list[float]
    updates: list[list[float]]
    after: list[float]
    reference: list[float] | None = None
    last: list[float] | None = None


@dataclass(frozen=True)
class ReplayedGroup:
    """The completions of one prompt."""

    problem: str
    prompt: str
    completions: list[Completion]

    @property
    def fork(self) -> Fork | None:
        return fork([one.tokens for one in self.completions], [one.advantage for one in self.completions])

    def chances(self, parting: Fork) -> dict[str, tuple[float, float]]:
        """Probability of the better and the worse branch of a fork, by stage: sampled, after the step, last."""
        ends = [self.completions[branch.samples[0]] for branch in (parting.better, parting.worse)]
        stages = {"sampled": [one.sampled for one in ends], "after": [one.after for one in ends]}
        stages |= {"last": [one.last for one in ends if one.last is not None]}
        chosen = {stage: [_chance(row, parting.position) for row in rows] for stage, rows in stages.items() if rows}
        return {stage: (better, worse) for stage, (better, worse) in chosen.items()}

    @property
    def change(self) -> float:
        """Mean absolute change of the completions' log-probabilities by the step."""
        moved = [abs(sum(one.after) - sum(one.updates[0])) for one in self.completions]
        return sum(moved) / len(moved)


@dataclass(frozen=True)
class Variant:
    """The gradient of the same batch under another loss: its cosine with that of the run, and the ratio of norms."""

    name: str
    cosine: float
    norm: float


@dataclass(frozen=True)
class Replay:
    """A step, taken again: its groups, the metrics as logged and as replayed, and the loss."""

    step: int
    start: int
    last_step: int | None  # of the checkpoint of `Completion.last`
    loss: Loss
    max_new_tokens: int
    logged: dict[str, float]
    replayed: dict[str, float]
    groups: list[ReplayedGroup]
    variants: list[Variant] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """The largest relative distance between a logged metric and the replayed one; 0 if equal bit for bit."""
        pairs = [(self.logged[name], self.replayed[name]) for name in self.replayed]
        return max((abs(old - new) / max(abs(old), 1e-6) for old, new in pairs), default=0.0)

    @property
    def completions(self) -> list[Completion]:
        return [one for group in self.groups for one in group.completions]

    @property
    def instructive(self) -> int:
        """The group to show: of those with unequal advantages, the one whose completions changed most."""
        mixed = [index for index, group in enumerate(self.groups) if any(one.advantage for one in group.completions)]
        return max(mixed or range(len(self.groups)), key=lambda index: self.groups[index].change)

    def terms(self) -> list[Terms]:
        """The loss of each inner update, token by token; the mean of their losses is the step's."""
        rows = self.completions
        lengths = torch.tensor([len(one.tokens) for one in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        whole = Step(len(rows), int(lengths.sum()), has_gradient=True)
        weight = normalizer(lengths, loss_type=self.loss.loss_type, max_new_tokens=self.max_new_tokens, step=whole)
        gain = torch.tensor([one.advantage for one in rows])
        kept = [one.reference for one in rows if one.reference is not None]
        reference = _padded(kept) if kept else None
        updates = [_padded([one.updates[number] for one in rows]) for number in range(len(rows[0].updates))]
        return [terms(own, updates[0], reference, gain, mask, weight, self.loss) for own in updates]


_REPLAY = TypeAdapter(Replay)


def plan(run: Run, step: int) -> Plan:
    """The plan of a replay; raises CountdownError if the run has no such step, or its loss cannot be taken apart."""
    seconds = {int(line["step"]): line.get("time/total", 0.0) for line in run.metrics() if line["step"] > 0}
    if step not in seconds:
        hint = f"choose one from 1 to {max(seconds)}" if seconds else "wait for its first step, or resume it"
        raise CountdownError(f"run `{run.name}` has no step {step}", hint)
    _require_plain_tokens(run, step)
    starts = [saved for saved, _ in run.checkpoints() if saved < step and run.damage(saved) is None]
    start = max(starts, default=0)
    return Plan(step, start, sum(spent for number, spent in seconds.items() if start < number <= step))


def _before(run: Run, step: int) -> list[Mapping[str, float]]:
    """The logged metrics of the steps before this one."""
    return [line for line in run.metrics() if 0 < line["step"] < step]


def _require_plain_tokens(run: Run, step: int) -> None:
    """Raise CountdownError if the loss of the step weighs tokens in a way that a replay does not record."""
    settings = restore(run.read_config(), run.config_path).settings
    loss, flags = corrected(settings.loss, _before(run, step)), list[str]()
    flags += ["--num-mini-batches"] if settings.train.num_mini_batches > 1 else []
    flags += ["--mask-truncated"] if loss.mask_truncated else []
    flags += ["--entropy-share"] if loss.entropy_share < 1 else []
    flags += ["--entropy-bonus"] if loss.entropy_bonus else []
    flags += ["--sampler-correction"] if loss.sampler_correction != "none" else []
    if flags:
        raise CountdownError(
            f"steps of run `{run.name}` cannot be explained yet: it was trained with `{flags[0]}`",
            f"`countdown why {run.name}` describes the run as a whole",
        )


def cached(run: Run, step: int, *, losses: bool) -> Replay | None:
    """The kept replay of a step, if the run still has the same metrics and last checkpoint."""
    text = run.read_replay(step)
    try:
        known = None if text is None else _REPLAY.validate_json(text)
    except ValidationError:
        return None
    if known is None or (losses and not known.variants):
        return None
    same = known.logged == _logged(run, step) and known.last_step == _last(run)
    return known if same else None


def replay(run: Run, planned: Plan, *, losses: bool = False, observer: Observer | None = None) -> Replay:
    """Take the step again and keep the result in the run; `losses`: compare gradients under other losses too."""
    settings = restore(run.read_config(), run.config_path).settings
    # Without `max_bad_steps`, no failed step ends the replay and saves a checkpoint.
    changes = {"train": {"tracker": "none", "max_bad_steps": 10**9}, "ranks": {"shard": False}}
    tables = {name: getattr(settings, name).model_copy(update=change) for name, change in changes.items()}
    settings = settings.model_copy(update={"runs": str(run.path.parent), **tables})
    with build(settings, run.name, replay=planned.start, context=Context(observer=observer or Observer())) as trainer:
        for number in range(planned.start + 1, planned.step):
            trainer.history = _before(run, number)
            trainer.step(number)
        trainer.history = _before(run, planned.step)
        before = [weight.detach().clone() for weight in trainer.state.learner.trainable] if losses else []
        updates: dict[int, dict[int, list[float]]] = {}

        def watch(number: int, rows: list[int], logprobs: Tensor) -> None:
            updates.setdefault(number, {}).update(zip(rows, logprobs.float().tolist(), strict=True))

        result = trainer.step(planned.step, watch)
        replayed = _record(run, trainer, planned, result, updates)
        if losses:
            _set_weights(trainer.state.learner, before)
            replayed = replace(replayed, variants=_compare(trainer, result, settings.loss))
    run.write_replay(planned.step, _REPLAY.dump_json(replayed))
    return replayed


def _record(
    run: Run, trainer: Trainer, planned: Plan, result: StepResult, updates: Mapping[int, Mapping[int, Sequence[float]]]
) -> Replay:
    """The step as plain data; leaves the weights of the last checkpoint in the trainer."""
    batch, settings = result.batch, trainer.settings
    after = _logprobs(trainer, batch)
    last_step, last = _last(run), None
    if last_step is not None:
        kept = [weight.detach().clone() for weight in trainer.state.learner.trainable]
        trainer.state.fall_back(run.checkpoint_path(last_step))
        last = _logprobs(trainer, batch)
        _set_weights(trainer.state.learner, kept)
    logged, values = _logged(run, planned.step), {**batch.metrics, **result.metrics}
    decode = trainer.state.policy.tokenizer.decode
    rows = iter(range(len(batch.completions)))
    groups = [
        ReplayedGroup(
            str(group.problem),
            str(decode(group.prompt)),
            [
                _completion(group, sample, next(rows), decode, result, updates, after, last)
                for sample in range(len(group.completions))
            ],
        )
        for group in batch.groups
    ]
    return Replay(
        planned.step,
        planned.start,
        last_step,
        settings.loss,
        settings.train.max_new_tokens,
        logged,
        {name: float(values[name]) for name in logged if name in values},
        groups,
    )


def _completion(
    group: Group,
    sample: int,
    row: int,
    decode: Callable[[list[int]], object],
    result: StepResult,
    updates: Mapping[int, Mapping[int, Sequence[float]]],
    after: Tensor,
    last: Tensor | None,
) -> Completion:
    """A completion of a group, in row `row` of the step, as plain data."""
    tokens, score, known = group.completions[sample], group.scores[sample], result.ref_logprobs
    count = len(tokens)
    sampled = group.logprobs[sample][:count]
    own = [list(rows[row])[:count] for rows in updates.values() if row in rows]
    return Completion(
        text=group.texts[sample],
        tokens=tokens,
        pieces=[str(decode([token])) for token in tokens],
        reward=score.reward,
        parts=dict(score.parts),
        advantage=float(group.advantages[sample]),
        reason=score.reason,
        truncated=group.truncated[sample],
        sampled=sampled,
        updates=own or [sampled] * max(1, len(updates)),  # no update had this row: it has no gradient
        after=after[row, :count].tolist(),
        reference=None if known is None else known[row, :count].tolist(),
        last=None if last is None else last[row, :count].tolist(),
    )


def _logprobs(trainer: Trainer, batch: Batch) -> Tensor:
    """Log-probabilities (B, T) of the batch under the policy as it is now."""
    policy = replace(trainer.state.learner, adapter=None)  # a reference would switch it off
    temperature, rows = trainer.settings.train.temperature, trainer.micro_batch
    return reference_logprobs(Reference(policy), batch.sequences, temperature=temperature, micro_batch=rows).cpu()


def _compare(trainer: Trainer, result: StepResult, loss: Loss) -> list[Variant]:
    """The gradients of the batch under other losses, at the weights before the step, compared with the run's own."""
    logprobs = _logprobs(trainer, result.batch)
    coefficients = {name: _coefficients(trainer, result, own, logprobs) for name, own in variants(loss).items()}
    own = _gradient(trainer, result.batch, coefficients[OWN])
    size, compared = math.sqrt(_dot(own, own)), list[Variant]()
    for name, values in coefficients.items():
        gradient = own if torch.equal(values, coefficients[OWN]) else _gradient(trainer, result.batch, values)
        norm = math.sqrt(_dot(gradient, gradient))
        compared.append(Variant(name, _dot(gradient, own) / (norm * size) if norm * size else 0.0, norm))
    return compared


def _dot(left: Tensor, right: Tensor) -> float:
    """The inner product of two vectors, in double precision, chunk by chunk."""
    pairs = zip(left.split(CHUNK), right.split(CHUNK), strict=True)
    return sum(float(one.double() @ other.double()) for one, other in pairs)


def _coefficients(trainer: Trainer, result: StepResult, loss: Loss, logprobs: Tensor) -> Tensor:
    """The derivative (B, T) of a loss with respect to log-probabilities, in the first inner update."""
    batch = result.batch
    gain = trainer.advantages(batch, result.ref_logprobs, loss).flatten()
    lengths = torch.tensor([len(one) for one in batch.completions])
    limit = trainer.settings.train.max_new_tokens
    weight = normalizer(lengths, loss_type=loss.loss_type, max_new_tokens=limit)
    reference = result.ref_logprobs
    own = None if reference is None else reference.cpu()
    return terms(logprobs, logprobs, own, gain, batch.sequences.mask(), weight, loss).coefficient


def _gradient(trainer: Trainer, batch: Batch, coefficients: Tensor) -> Tensor:
    """The gradient (N,) of the sum of log-probabilities times `coefficients` (B, T)."""
    learner, sequences = trainer.state.learner, batch.sequences
    learner.model.zero_grad(set_to_none=True)
    for rows in trainer.micro_batch.split(coefficients.any(dim=1).nonzero()[:, 0].tolist()):
        logprobs, _ = learner.logprobs(
            sequences.subset(rows),
            temperature=trainer.settings.train.temperature,
            entropy="none",
            logit_chunk=trainer.micro_batch.logit_chunk,
        )
        own = coefficients[rows, : logprobs.shape[1]].to(logprobs.device)
        (logprobs * own).sum().backward()
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in learner.trainable]
    gradient = torch.cat([part.detach().float().flatten() for part in parts])
    learner.model.zero_grad(set_to_none=True)
    return gradient


@torch.no_grad()
def _set_weights(policy: Policy, weights: Sequence[Tensor]) -> None:
    for weight, kept in zip(policy.trainable, weights, strict=True):
        weight.copy_(kept)


def _chance(logprobs: Sequence[float], position: int) -> float:
    """The probability of the token at a position; 1 past the end, where nothing is sampled."""
    return math.exp(logprobs[position]) if position < len(logprobs) else 1.0


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of different lengths as one tensor (B, T), padded with 0."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _logged(run: Run, step: int) -> dict[str, float]:
    """The logged metrics of a step that a replay is checked against."""
    line = next(line for line in run.metrics() if line["step"] == step)
    return {name: line[name] for name in CHECKED if name in line}


def _last(run: Run) -> int | None:
    """The step of the last intact checkpoint."""
    return max((step for step, _ in run.checkpoints() if run.damage(step) is None), default=None)
