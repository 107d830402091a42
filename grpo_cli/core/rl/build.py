"""Settings -> Trainer: a new training, one after a warm start, or a resumed one. Everything is built here, once.

    settings = resolve(flags={"train.num_iterations": 20}).settings
    result = train(settings, "first", observer)

The command line, notebooks and benchmarks all use this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grpo_cli.core import fsdp
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals import contamination
from grpo_cli.core.evals.evaluate import Evaluation, Evaluator
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import detect_device, fix_order, free_memory, load_tokenizer, set_threads
from grpo_cli.core.model.lora import Lora
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.model.templates import encode
from grpo_cli.core.perf import memory
from grpo_cli.core.perf.memory import MemoryPlan
from grpo_cli.core.perf.utilization import Meter, operations
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.collect import Collector
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.labs import broken
from grpo_cli.core.rl.observer import Observer, Observers
from grpo_cli.core.rl.schedule import Problems, longest_prompt
from grpo_cli.core.rl.state import (
    Progress,
    State,
    build_optimizer,
    choose_checkpoint,
    choose_optimizer,
    environment,
    require_origin,
    settled,
)
from grpo_cli.core.rl.summary import summary
from grpo_cli.core.rl.trackers import Tracked, require_tracker
from grpo_cli.core.rl.train import Trainer
from grpo_cli.core.rl.validate import Validation
from grpo_cli.core.rl.warm_start import Stage, optimizer_of, stages_of, warm_start
from grpo_cli.core.rollout.make import make_engine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.selfcheck import load_checked, recheck
from grpo_cli.core.run.folder import Run, require_space
from grpo_cli.core.run.models import model_source
from grpo_cli.core.task.task import Task
from grpo_cli.core.world import World

Note = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """A finished training. `overlap` is a sentence on how many evaluation puzzles were trained on."""

    run: Run
    evaluation: Evaluation
    summary: Mapping[str, object]
    overlap: str


def train(
    settings: Settings, name: str | None = None, observer: Observer | None = None, *, overwrite: bool = False
) -> Result:
    """Train a new run to the end; `name` None picks run-1, run-2, ..."""
    context = Context(observer=observer or Observer())
    with build(settings, name, overwrite=overwrite, context=context) as trainer:
        return finish(trainer)


def finish(trainer: Trainer) -> Result:
    """Train to the end and write the summary. If its control says stop, saves and raises Interrupted."""
    with trainer.context.control:
        evaluation = trainer.train()
    run = trainer.run
    seen = contamination.known(run.name, run.path.parent)
    evaluation = replace(evaluation, known=seen)
    facts = summary(trainer.state.progress, evaluation, run, broken=trainer.settings.train.broken)
    run.write_summary(facts)
    return Result(run, evaluation, facts, seen.statement(evaluation.puzzles))


@dataclass(frozen=True)
class ResumePoint:
    """The run to continue, and the step and folder of its checkpoint; empty for a new run."""

    run: Run | None = None
    step: int = 0
    checkpoint: Path | None = None
    is_replay: bool = False  # steps are taken again, and nothing is written

    @property
    def warm_started(self) -> Path | None:
        """The model after the run's warm start."""
        folder = self.run.warm_start_path if self.run else None
        return folder if folder and folder.is_dir() else None


@contextmanager
def build(
    settings: Settings,
    name: str | None = None,
    *,
    task: Task | None = None,
    overwrite: bool = False,
    resume: bool | int = False,
    replay: int | None = None,
    context: Context | None = None,
) -> Iterator[Trainer]:
    """Load everything, open the run and warm-start if asked to; the run stays locked until the block ends.

    A new run is created only after its models have loaded. `resume` continues run `name` from its newest intact
    checkpoint, or from that of a step. `replay` starts from the run's checkpoint of a step, or its start if 0, to take
    steps again: then nothing is written. `task`: the task of the settings, if it is loaded already. The control of the
    `context` can stop a warm start, which raises Interrupted.
    """
    context = context or Context()
    require_tracker(settings.train.tracker)
    settings = for_ranks(settings, context.world.size)
    problems = Problems.of(settings, task)
    for sentence in problems.notes():
        context.note(sentence)
    with ExitStack() as stack:
        stack.enter_context(broken(settings))
        # 1. Choose the checkpoint to continue from.
        context = _tracked(settings, context, stack)
        point = _resume_point(settings, name, resume, replay, context, stack)
        _require_warm_start(point, settings)
        # 2. Load the policy, plan its memory, load the reference that `ref_model` names.
        stages = [] if point.checkpoint or point.warm_started else demonstrated(settings, problems)
        policy, plan = _load_policy(settings, problems, point, context)
        settings = settled(settings, policy)
        named = _named_reference(settings, policy, plan)
        # 3. Open the run, and imitate.
        if stages:
            needed = _num_checkpoints(settings) * _warm_start_state(policy).checkpoint_bytes()
            require_space(Path(settings.runs), needed)
        run = point.run or context.world.first(partial(_create, settings, name, stack, overwrite, context.note))
        run = replace(run, writes=context.world.is_first and not point.is_replay)
        origin = _origin_of(policy, point, problems, named)
        if stages:
            policy, origin = _imitate(policy, stages, run, settings, origin, plan, context)
        # 4. Build the state and the reference, or restore them.
        state, reference = _state_and_reference(settings, policy, point, plan, named, origin, problems, context.world)
        # 5. Record what this training is.
        with nullcontext() if point.run or stages else run.starting():
            if not point.is_replay:
                context.world.first(partial(_record, run, state, settings, point, origin, context))
        yield assemble(settings, state, reference, run, problems=problems, plan=plan, context=context)


def _state_and_reference(
    settings: Settings,
    policy: Policy,
    point: ResumePoint,
    plan: MemoryPlan,
    named: Reference | None,
    origin: Mapping[str, object],
    problems: Problems,
    world: World,
) -> tuple[State, Reference | None]:
    """The state, restored from the checkpoint if there is one, and the frozen reference.

    Raises CountdownError if the run to continue started from another model, other problems or another reference.
    """
    state = _state(settings, policy, world)
    reference = _reference(settings, state, plan, point, named)
    if point.run and point.checkpoint:
        known = _known_origin(policy, reference, named, point) | problems.hashes
        require_origin(point.run, known, model=settings.model.model, reference=settings.model.ref_model)
        state.restore(point.checkpoint)
    elif point.run and point.is_replay:
        require_origin(point.run, origin, model=settings.model.model, reference=settings.model.ref_model)
    if reference and state.learner.is_sharded:
        reference = Reference(fsdp.sharded(reference.policy, world, policy.device))
    return state, reference


def assemble(
    settings: Settings,
    state: State,
    reference: Reference | None,
    run: Run,
    *,
    problems: Problems | None = None,
    plan: MemoryPlan | None = None,
    context: Context | None = None,
) -> Trainer:
    """A trainer of what is loaded already; without a `plan`, memory has no limit."""
    context, problems = context or Context(), problems or Problems.of(settings)
    micro_batch = _micro_batch(plan, context.note, settings.train.micro_batch_size)
    engine = make_engine(
        state.policy,
        settings,
        max_new_tokens=settings.train.max_new_tokens,
        learner=state.learner,
        world=context.world,
    )
    clock = Clock(context.world)
    meter = Meter(state.learner, operations(state.policy))
    if state.learner.is_sharded and settings.model.rollout == "vllm":
        fsdp.keep_for_saving(state.policy, context.world)
    collector = Collector(
        engine, problems, settings.train, settings.reward, context, clock, meter, micro_batch.unlimited()
    )
    evaluator = Evaluator(
        engine,
        SamplingParams(settings.train.max_new_tokens, temperature=0.0),
        problems.task,
        settings.eval.batch_size,
        micro_batch=micro_batch.unlimited(),
        world=context.world,
    )
    validation = Validation(evaluator, settings, clock, context)
    return Trainer(settings, state, reference, collector, validation, run, context, clock, plan, micro_batch)


def _tracked(settings: Settings, context: Context, stack: ExitStack) -> Context:
    """The context, whose observer also logs to the tracker of the settings, on the rank that writes the run."""
    if settings.train.tracker == "none" or not context.world.is_first:
        return context
    tracked = Tracked(settings.train.tracker, settings, context.note)
    stack.callback(tracked.close)
    return replace(context, observer=Observers([context.observer, tracked]))


def _resume_point(
    settings: Settings,
    name: str | None,
    resume: bool | int,
    replay: int | None,
    context: Context,
    stack: ExitStack,
) -> ResumePoint:
    """The run and checkpoint to continue from, if the training is resumed or replayed."""
    if replay is not None and name is not None:
        run = Run.open(Path(settings.runs), name)
        checkpoint = choose_checkpoint(run, settings, replay, context.note) if replay else (0, None)
        return ResumePoint(run, *checkpoint, is_replay=True)
    if not resume or name is None:
        return ResumePoint()
    run, first = Run.open(Path(settings.runs), name), context.world.first
    first(partial(_lock, run, stack, context.note))
    step = None if resume is True else resume
    return ResumePoint(run, *first(partial(choose_checkpoint, run, settings, step, context.note)))


def _require_warm_start(point: ResumePoint, settings: Settings) -> None:
    """Raise CountdownError if the warm-started model is gone, from which the run to continue started."""
    run = point.run
    if run is None or point.warm_started:
        return
    finished = run.has_origin and run.read_origin().get("warm_start")
    if finished or (point.is_replay and settings.train.warm_start):
        raise CountdownError(
            f"`{run.warm_start_path}` is gone, the model from which run `{run.name}` started",
            "restore the folder, or start a new run",
        )


def _warm_start_state(policy: Policy) -> State:
    """The state of a warm start before its first step."""
    return State(policy, optimizer_of(policy), policy)


def _imitate(
    policy: Policy,
    stages: Sequence[Stage],
    run: Run,
    settings: Settings,
    origin: Mapping[str, object],
    plan: MemoryPlan,
    context: Context,
) -> tuple[Policy, dict[str, object]]:
    """The warm-started policy, and the origin with its hash."""
    rows = plan.choices.rows or settings.train.batch_size * settings.train.num_generations
    micro_batch = _micro_batch(plan, context.note, rows)
    state = _warm_start_state(policy)
    known = warm_start(state, stages, run, settings, origin, micro_batch=micro_batch, context=context)
    if policy.adapter:  # its base is from now on the warm-started model, for the reference too
        policy = _load(settings, str(run.warm_start_path), policy.name, _ignore, adapter=policy.adapter)
    return policy, known


def for_ranks(settings: Settings, ranks: int) -> Settings:
    """The settings for this many ranks; sharding needs several, and an optimizer that supports sharded tensors."""
    if not settings.ranks.shard:
        return settings
    if ranks == 1:
        raise CountdownError(
            "`--shard` spreads a model over several processes", "start them with torchrun, or give `--no-shard`"
        )
    if settings.train.optimizer == "adamw8bit":
        raise CountdownError("`adamw8bit` does not support sharded tensors", "use `--optimizer adamw` with `--shard`")
    train = settings.train.model_copy(update={"optimizer": "adamw"})
    return settings.model_copy(update={"train": train})


def demonstrated(settings: Settings, problems: Problems) -> list[Stage]:
    """The searches that a warm start imitates, or none; raises CountdownError if there can be none."""
    if not settings.train.warm_start:
        return []
    return stages_of(settings, problems, load_tokenizer(model_source(Path(settings.runs), settings.model.model)))


def plan_memory(
    settings: Settings, problems: Problems, *, ranks: int = 1, free: int = 0, policy: Policy | None = None
) -> MemoryPlan:
    """Plan each rank's memory from the model's config and tokenizer.

    `free` is in bytes; settings override it. `policy`: once loaded, its tokenizer and how it computes.
    """
    asked = settings.model
    needs_no_gpu = asked.device == "cuda" and asked.memory > 0
    device = torch.device("cuda") if needs_no_gpu else detect_device(asked.device)
    source = model_source(Path(settings.runs), settings.model.model)
    tokenizer = policy.tokenizer if policy else load_tokenizer(source)
    longest = longest_prompt(settings, problems, partial(encode, tokenizer))
    optimizer = choose_optimizer(settings.train.optimizer, device)
    work = memory.Work.of(settings, device=device, optimizer=optimizer, prompt_tokens=longest, ranks=ranks)
    return memory.plan_for(source, work, settings, free=free, path=policy.path if policy else None)


def _lock(run: Run, stack: ExitStack, note: Note) -> None:
    left_by = stack.enter_context(run.locked())
    if left_by is not None:
        note(f"taking over run {run.name}: process {left_by}, which wrote it, no longer holds its lock")


def _create(settings: Settings, name: str | None, stack: ExitStack, overwrite: bool, note: Note) -> Run:
    """A new run, locked until the end of the training."""
    run = Run.create(Path(settings.runs), name, overwrite=overwrite)
    _lock(run, stack, note)
    return run


def _load(settings: Settings, source: str, name: str, note: Note, **options: Any) -> Policy:
    """Load a model, called `name`, for the device and in the precision of the settings."""
    model = settings.model
    return load_checked(source, name=name, device=model.device, precision=model.precision, note=note, **options)


def _load_policy(
    settings: Settings, problems: Problems, point: ResumePoint, context: Context
) -> tuple[Policy, MemoryPlan]:
    """The policy on the fastest path that computes right, and the plan of its memory.

    All ranks choose the same plan: that for the least free memory.
    """
    device, adapter, world, note = detect_device(settings.model.device), Lora.of(settings), context.world, context.note
    set_threads(settings.model.threads)
    if device.type == "cpu":
        note(f"device: CPU; threads: {torch.get_num_threads()}")
    if settings.train.deterministic:
        fix_order()
    free = min(world.gather(free_memory(device)))
    memory.limit(settings, device)
    folder = point.checkpoint / "model" if point.checkpoint and not adapter else point.warm_started
    name = settings.model.model
    source = str(folder or model_source(Path(settings.runs), name))
    policy = _load(settings, source, name, note, adapter=adapter)
    plan = plan_memory(settings, problems, ranks=world.size, free=free, policy=policy)
    return (recheck(policy, note) if plan.choices.checkpointing else policy), plan


def _named_reference(settings: Settings, policy: Policy, plan: MemoryPlan) -> Reference | None:
    """The model that `ref_model` names, or None without KL and if the reference is the starting model."""
    name = settings.model.ref_model
    if settings.loss.beta == 0 or name == "same":
        return None
    named = _load(settings, model_source(Path(settings.runs), name), name, _ignore)
    if named.fingerprint()["tokenizer"] != policy.fingerprint()["tokenizer"]:
        raise CountdownError(
            f"`{name}` and `{settings.model.model}` have different tokenizers",
            "choose a `--ref-model` with the same tokenizer",
        )
    return Reference.of(named, on_host=plan.choices.on_host or settings.ranks.shard)


def _reference(
    settings: Settings, state: State, plan: MemoryPlan, point: ResumePoint, named: Reference | None
) -> Reference | None:
    """The frozen reference, if the loss needs one: `named`, or the model that reinforcement started from."""
    if settings.loss.beta == 0:
        return None
    reference, policy, name = named, state.policy, settings.model.model
    if reference is None:
        if point.checkpoint and not policy.adapter:  # an adapter's base model never changes
            source = str(point.warm_started or model_source(Path(settings.runs), name))
            policy = _load(settings, source, name, _ignore)
        reference = Reference.of(policy, on_host=plan.choices.on_host or settings.ranks.shard)
    return reference


def _state(settings: Settings, policy: Policy, world: World) -> State:
    """The state before the first step, with sharded weights if the settings say so."""
    learner = fsdp.sharded(policy, world, policy.device) if settings.ranks.shard else policy
    train = settings.train
    progress = Progress(unlogged={"step": 0})  # the evaluation of the starting model
    optimizer = build_optimizer(learner, name=train.optimizer, weight_decay=train.weight_decay)
    return State(policy, optimizer, learner, progress)


def _origin_of(policy: Policy, point: ResumePoint, problems: Problems, named: Reference | None) -> dict[str, object]:
    """Hashes of what a training starts from: weights and tokenizer of its model, its problems, a named reference."""
    start: Mapping[str, object] = policy.fingerprint()
    if point.run and point.warm_started:  # whose model is no longer the one that the run started from
        saved = point.run.read_origin()
        start = {"warm_start": start["weights"], **{name: saved.get(name) for name in ("weights", "tokenizer")}}
    reference = {"reference": named.policy.fingerprint()["weights"]} if named else {}
    return {**start, **reference, **problems.hashes}


def _known_origin(
    policy: Policy, reference: Reference | None, named: Reference | None, point: ResumePoint
) -> dict[str, object]:
    """The hashes of its origin that a resumed training can check: a checkpoint holds other weights than the start."""
    if reference is None and not policy.adapter:
        return {}
    known = (reference.policy if reference else policy).fingerprint()
    if named:
        return {"reference": known["weights"]}
    return {"warm_start" if point.warm_started else "weights": known["weights"], "tokenizer": known["tokenizer"]}


def _micro_batch(plan: MemoryPlan | None, report: Note, rows: int) -> MicroBatch:
    """The planned micro-batch size, or `rows` if not 0, and the plan's limit."""
    if plan is None:
        return MicroBatch(rows, report=report)
    choices = plan.choices
    return MicroBatch(rows or choices.rows, limit=plan.limit, logit_chunk=choices.logit_chunk, report=report)


def _num_checkpoints(settings: Settings) -> int:
    """Checkpoints on the disk at a time: old ones are removed after the new one is written."""
    return settings.train.keep_last + 1


def _record(
    run: Run, state: State, settings: Settings, point: ResumePoint, origin: Mapping[str, object], context: Context
) -> None:
    """Write the settings, the environment and the origin; cut a resumed run back to its checkpoint."""
    run.end_warming()
    require_space(run.path, _num_checkpoints(settings) * state.checkpoint_bytes())
    run.write_config(settings.model_dump())
    run.write_environment(environment(state.policy) | {"ranks": context.world.size}, step=point.step)
    if point.checkpoint is None:
        run.write_origin(origin)
    if point.run:
        pending = state.progress.unlogged is not None
        for sentence in point.run.go_back_to(point.step if point.checkpoint else -1, pending=pending):
            context.note(sentence)


def _ignore(_: str) -> None:
    """No note: the outcome of the policy's self-check is reported already."""
