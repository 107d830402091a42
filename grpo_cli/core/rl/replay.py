"""Replay a step of a run: take it again from the nearest earlier checkpoint, or from the start, and record it.

The samples of a step are a function of (seed, step, weights), so the replay is checked against the logged metrics:
equal bit for bit on the same CPU with as many threads. Nothing in the run changes, except that a finished replay is
kept there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.build import build
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.explain import OWN, Fork, fork, variants
from grpo_cli.core.rl.observer import Observer
from grpo_cli.core.rl.state import newest_intact
from grpo_cli.core.rl.train import StepResult, Trainer
from grpo_cli.core.rl.update import NotFinite, Objective, Terms, reference_logprobs, update
from grpo_cli.core.run.folder import Run, at

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
    """A completion with its tokens as the update had them, their log-probabilities at each stage, and their terms.

    `updates`: of each inner update, none if the completion has no gradient. `after` is the policy's after the step,
    `last` that of the run's last checkpoint.
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
    updates: list[Terms]
    after: list[float]
    reference: list[float] | None = None
    last: list[float] | None = None

    @property
    def before(self) -> list[float]:
        """The trainer's log-probabilities before the step; the sampler's, which are the same, if it computed none."""
        return self.updates[0].old if self.updates else self.sampled

    def mean(self, name: str) -> list[float]:
        """A term of each token, the mean over inner updates; 0 without."""
        rows = [getattr(update, name) for update in self.updates]
        return [fmean(values) for values in zip(*rows, strict=True)] if rows else [0.0] * len(self.tokens)


@dataclass(frozen=True)
class ReplayedGroup:
    """The completions of one prompt."""

    problem: str
    prompt: str
    completions: list[Completion]

    @property
    def learns(self) -> bool:
        """Whether a completion has an advantage, and is not left out of the loss."""
        return any(one.advantage and one.updates for one in self.completions)

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
        moved = [abs(sum(one.after) - sum(one.before)) for one in self.completions]
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
    updates: int  # of the weights
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
        """The group to show: of those that taught something, the one whose completions changed most."""
        mixed = [index for index, group in enumerate(self.groups) if group.learns]
        return max(mixed or range(len(self.groups)), key=lambda index: self.groups[index].change)

    def total(self, name: str) -> float:
        """A term of the loss, summed over all tokens; that of `loss` is the logged loss."""
        return math.fsum(value for one in self.completions for value in one.mean(name))

    def shares(self, one: Completion) -> list[float]:
        """The share of each token of a completion in the step's gradient; all 0 if there is none."""
        whole = self.total("size")
        return [size / whole if whole else 0.0 for size in one.mean("size")]


_REPLAY = TypeAdapter(Replay)


def plan(run: Run, step: int) -> Plan:
    """The plan of a replay; raises CountdownError if the run has no such step, or cannot sample it again."""
    seconds = {int(line["step"]): line.get("time/total", 0.0) for line in run.metrics() if line["step"] > 0}
    if step not in seconds:
        hint = f"choose one from 1 to {max(seconds)}" if seconds else "wait for its first step, or resume it"
        raise CountdownError(f"run `{run.name}` has no step {step}", hint)
    if run.settings.model.rollout == "vllm":
        raise CountdownError(
            f"steps of run `{run.name}` cannot be replayed: vLLM does not draw the same completions again",
            f"`countdown why {run.name}{at(run.path.parent)}` describes the run as a whole",
        )
    start = newest_intact(run, below=step) or 0
    return Plan(step, start, sum(spent for number, spent in seconds.items() if start < number <= step))


def _before(run: Run, step: int) -> list[Mapping[str, float]]:
    """The logged metrics of the steps before this one."""
    return [line for line in run.metrics() if 0 < line["step"] < step]


def cached(run: Run, step: int, *, losses: bool) -> Replay | None:
    """The kept replay of a step, if the run still has the same metrics and last checkpoint."""
    text = run.read_replay(step)
    try:
        known = None if text is None else _REPLAY.validate_json(text)
    except ValidationError:
        return None
    if known is None or (losses and not known.variants):
        return None
    same = known.logged == _logged(run, step) and known.last_step == newest_intact(run)
    return known if same else None


def replay(run: Run, planned: Plan, *, losses: bool = False, observer: Observer | None = None) -> Replay:
    """Take the step again and keep the result in the run; `losses`: compare gradients under other losses too."""
    settings = run.settings
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
        updates: dict[int, dict[int, Terms]] = defaultdict(dict)

        def watch(number: int, row: int, terms: Terms) -> None:
            updates[row][number] = terms

        result = trainer.step(planned.step, watch)
        replayed = _record(run, trainer, planned, result, updates)
        if losses:
            _set_weights(trainer.state.learner, before)
            replayed = replace(replayed, variants=_compare(trainer, result))
    run.write_replay(planned.step, _REPLAY.dump_json(replayed))
    return replayed


def _record(
    run: Run, trainer: Trainer, planned: Plan, result: StepResult, updates: Mapping[int, Mapping[int, Terms]]
) -> Replay:
    """The step as plain data; leaves the weights of the last checkpoint in the trainer."""
    batch, train = result.batch, trainer.settings.train
    logged, values = _logged(run, planned.step), {**batch.metrics, **result.metrics}
    updates = updates if "loss" in values else {}  # else the step was skipped
    rows = _completions(trainer, result, updates, _logprobs(trainer, result.examples))
    if (last := newest_intact(run)) is not None:
        kept = [weight.detach().clone() for weight in trainer.state.learner.trainable]
        trainer.state.fall_back(run.checkpoint_path(last))
        ends = _logprobs(trainer, result.examples)
        rows = [replace(one, last=own[: len(one.tokens)].tolist()) for one, own in zip(rows, ends, strict=True)]
        _set_weights(trainer.state.learner, kept)
    given, decode = iter(rows), trainer.state.policy.tokenizer.decode
    groups = [
        ReplayedGroup(str(group.problem), str(decode(group.prompt)), list(islice(given, len(group.completions))))
        for group in batch.groups
    ]
    return Replay(
        planned.step,
        planned.start,
        last,
        result.loss,
        train.num_inner_updates * train.num_mini_batches,
        logged,
        {name: float(values[name]) for name in logged if name in values},
        groups,
    )


def _completions(
    trainer: Trainer, result: StepResult, updates: Mapping[int, Mapping[int, Terms]], after: Tensor
) -> list[Completion]:
    """The completions of the step as plain data, without those of the last checkpoint."""
    examples, decode, completions = result.examples, trainer.state.policy.tokenizer.decode, list[Completion]()
    samples = [pair for group in result.batch.groups for pair in zip(group.texts, group.scores, strict=True)]
    for row, ((text, score), tokens) in enumerate(zip(samples, examples.sequences.completions, strict=True)):
        count, reference = len(tokens), examples.ref_logprobs
        completions.append(
            Completion(
                text=text,
                tokens=tokens,
                pieces=[str(decode([token])) for token in tokens],
                reward=score.reward,
                parts=dict(score.parts),
                advantage=float(examples.advantages[row]),
                reason=score.reason,
                truncated=examples.truncated[row],
                sampled=list(examples.sampled_logprobs[row]),
                updates=list(updates.get(row, {}).values()),
                after=after[row, :count].tolist(),
                reference=None if reference is None else reference[row, :count].tolist(),
            )
        )
    return completions


def _logprobs(trainer: Trainer, examples: Examples) -> Tensor:
    """Log-probabilities (B, T) of the step's tokens under the policy as it is now."""
    policy = replace(trainer.state.learner, adapter=None)  # a reference would switch it off
    temperature, rows = trainer.settings.train.temperature, trainer.micro_batch
    return reference_logprobs(Reference(policy), examples.sequences, temperature=temperature, micro_batch=rows).cpu()


def _compare(trainer: Trainer, result: StepResult) -> list[Variant]:
    """The gradients of the batch under other losses, at the weights before the step, compared with the run's own."""
    own, compared = _gradient(trainer, result, result.loss), list[Variant]()
    size = math.sqrt(_dot(own, own))
    for name, loss in variants(result.loss).items():
        gradient = own if name == OWN else _gradient(trainer, result, loss)
        norm = math.sqrt(_dot(gradient, gradient))
        compared.append(Variant(name, _dot(gradient, own) / (norm * size) if norm * size else 0.0, norm))
    return compared


def _dot(left: Tensor, right: Tensor) -> float:
    """The inner product of two vectors, in double precision, chunk by chunk."""
    pairs = zip(left.split(CHUNK), right.split(CHUNK), strict=True)
    return sum(float(one.double() @ other.double()) for one, other in pairs)


def _gradient(trainer: Trainer, result: StepResult, loss: Loss) -> Tensor:
    """The gradient (N,) of the first update of the whole batch; 0 if there is none, or if it is not finite."""
    learner = trainer.state.learner
    gradient = torch.zeros(sum(weight.numel() for weight in learner.trainable))
    optimizer = torch.optim.SGD(learner.trainable, lr=0.0)  # leaves the weights as they are

    def keep(*_: object) -> None:
        torch.cat([_grad(weight).flatten().float() for weight in learner.trainable], out=gradient)

    optimizer.register_step_pre_hook(keep)
    whole = replace(
        Objective.of(trainer.settings.train, loss), num_inner_updates=1, num_mini_batches=1, clip_grad_norm=math.inf
    )
    with suppress(NotFinite):
        examples = trainer.examples(result.batch, result.examples.ref_logprobs, loss)
        update(learner, optimizer, examples, whole, micro_batch=trainer.micro_batch)
    return gradient


def _grad(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


@torch.no_grad()
def _set_weights(policy: Policy, weights: Sequence[Tensor]) -> None:
    for weight, kept in zip(policy.trainable, weights, strict=True):
        weight.copy_(kept)


def _chance(logprobs: Sequence[float], position: int) -> float:
    """The probability of the token at a position; 1 past the end, where nothing is sampled."""
    return math.exp(logprobs[position]) if position < len(logprobs) else 1.0


def _logged(run: Run, step: int) -> dict[str, float]:
    """The logged metrics of a step that a replay is checked against."""
    line = next(line for line in run.metrics() if line["step"] == step)
    return {name: line[name] for name in CHECKED if name in line}
