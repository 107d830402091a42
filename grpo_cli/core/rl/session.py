"""Build, start or resume a training. The command line, notebooks and benchmarks all use this module.

    settings = resolve(flags={"train.num_iterations": 20}).settings
    result = train(settings, "first", observer)

`start` loads the model, opens the run and locks it; `Session.train` runs the loop and writes the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.dist import shards
from grpo_cli.core.dist.ranks import Solo
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals import contamination
from grpo_cli.core.evals.evaluate import Evaluation
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import detect_device, fix_order, free_memory, load_tokenizer
from grpo_cli.core.model.lora import Lora
from grpo_cli.core.model.policy import Policy, encode
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.perf import memory
from grpo_cli.core.perf.memory import Choices, MemoryPlan
from grpo_cli.core.rl import train as loop
from grpo_cli.core.rl.observer import Control, Observer
from grpo_cli.core.rl.schedule import curriculum, longest_prompt, splits
from grpo_cli.core.rl.state import (
    Training,
    build_optimizer,
    choose_checkpoint,
    choose_optimizer,
    environment,
    origin,
    problem_hashes,
    require_origin,
    settled,
)
from grpo_cli.core.rl.summary import summary
from grpo_cli.core.rl.trackers import require_tracker, tracked
from grpo_cli.core.rl.warm_start import Lesson, imitation, lessons, resumable
from grpo_cli.core.run.folder import Run, require_space
from grpo_cli.core.run.models import model_source
from grpo_cli.core.sampling.selfcheck import load_checked
from grpo_cli.core.task.countdown import task_of

Note = Callable[[str], None]


def _ignore(_: str) -> None: ...


@dataclass(frozen=True)
class Result:
    """A finished training. `overlap` is a sentence on how many evaluation puzzles were trained on."""

    run: Run
    evaluation: Evaluation
    summary: Mapping[str, object]
    overlap: str


@dataclass(frozen=True)
class Session:
    """A training that is loaded, locked and ready to run."""

    run: Run
    training: Training
    reference: Reference | None
    settings: Settings
    memory: MemoryPlan
    ranks: Solo

    def train(self, observer: Observer, control: Control | None = None) -> Result:
        """Train to the end and write the summary. If `control` says stop, save and raise Interrupted."""
        rows = self.settings.train.micro_batch_size
        with tracked(observer, self.run, self.settings, start=self.training.step) as watching:
            evaluation = loop.train(
                self.training,
                self.reference,
                self.run,
                self.settings,
                watching,
                fit=_fit(self.memory, watching.message, rows),
                control=control,
                ranks=self.ranks,
            )
        return self.ranks.own(partial(self._finish, evaluation))

    def _finish(self, evaluation: Evaluation) -> Result:
        seen = contamination.known(self.run.name, self.run.path.parent)
        evaluation = replace(evaluation, known=seen)
        facts = summary(self.training, evaluation, self.run)
        if self.run.writes:
            self.run.write_summary(facts)
        return Result(self.run, evaluation, facts, seen.statement(evaluation.puzzles))


def train(
    settings: Settings, name: str | None = None, observer: Observer | None = None, *, overwrite: bool = False
) -> Result:
    """Train a new run; `name` None picks run-1, run-2, ..."""
    observer = observer or Observer()
    with start(settings, name, overwrite=overwrite, note=observer.message) as session:
        return session.train(observer)


@contextmanager
def start(
    settings: Settings,
    name: str | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    step: int | None = None,
    ranks: Solo | None = None,
    control: Control | None = None,
    note: Note = _ignore,
) -> Iterator[Session]:
    """Load everything and open the run, which stays locked until the block ends.

    A new run is created only after its models have loaded. `resume` continues run `name` from its newest intact
    checkpoint, or from that of `step`. `control` can stop a warm start, which raises Interrupted. `note` receives
    sentences for the user.
    """
    require_tracker(settings.train.tracker)
    ranks, root = ranks or Solo(), Path(settings.runs)
    settings = for_ranks(settings, ranks.size)
    hashes = _check_problems(settings, note)
    device = detect_device(settings.model.device)
    if settings.train.deterministic:
        fix_order()
    free = min(ranks.each(lambda: free_memory(device)))  # all ranks must choose the same plan
    replan = partial(plan_memory, settings, ranks=ranks.size, free=free)
    plan = ranks.own(replan)
    memory.limit(settings, device)
    with ExitStack() as locks:
        # 1. Choose the checkpoint to continue from.
        past = _Past()
        if resume and name:
            old = Run.open(root, name)
            ranks.first(lambda: _lock(old, locks, note))
            past = _Past(old, *ranks.first(lambda: choose_checkpoint(old, settings, step, note)))
        # 2. Load the models.
        examples = [] if past.checkpoint or past.warmed else demonstrated(settings, ranks.size)
        policy, plan = ranks.own(lambda: _load_planned(settings, past, plan, replan, note))
        settings = settled(settings, policy)
        other = ranks.own(lambda: _other_reference(settings, policy, plan.choices))

        # 3. Imitate, or restore the checkpoint.
        def open_run() -> Run:
            run = past.run or Run.create(root, name, overwrite=overwrite)
            if past.run is None:
                _lock(run, locks, note)
            return run

        warmed = None
        if examples:
            warmed = _warm_up(open_run, policy, examples, settings, plan, hashes, control or Control(), note)
        training = _training(policy, settings, ranks, device)
        reference = ranks.own(lambda: _restore(training, settings, plan.choices, past, hashes, other))

        # 4. Open the run.
        def begin() -> Run:
            run = warmed or open_run()
            run.end_warming()
            with nullcontext() if past.run or warmed else run.starting():
                _record(run, training, settings, step=past.step, ranks=ranks.size)
                if past.checkpoint is None:
                    run.write_origin(origin(policy, reference, hashes))
            for moved in past.cut(pending=training.pending is not None):
                note(moved)
            return run

        run = replace(ranks.first(begin), writes=ranks.rank == 0)
        if reference and training.learner:
            reference = Reference(shards.sharded(reference.policy, ranks, device))
        yield Session(run, training, reference, settings, plan, ranks)


@dataclass(frozen=True)
class _Past:
    """What a training continues: a run, and the step and folder of its checkpoint. Empty for a new run."""

    run: Run | None = None
    step: int = 0
    checkpoint: Path | None = None

    @property
    def warmed(self) -> Path | None:
        """The model after the run's warm start."""
        folder = self.run.warm_start_path if self.run else None
        return folder if folder and folder.is_dir() else None

    def cut(self, *, pending: bool) -> list[str]:
        """Cut the run back to the checkpoint; returns a sentence on each log with damaged lines."""
        return self.run.go_back_to(self.step if self.checkpoint else -1, pending=pending) if self.run else []


def _record(run: Run, training: Training, settings: Settings, *, step: int, ranks: int) -> None:
    """Write the settings and the environment from `step` on."""
    require_space(run.path, 2 * training.checkpoint_bytes())
    run.write_config(settings.model_dump())
    run.write_environment(environment(training.policy) | {"ranks": ranks}, step=step)


def _check_problems(settings: Settings, note: Note) -> dict[str, str]:
    """Hashes of the problems of all splits; raises CountdownError if a training cannot have them."""
    task = task_of(settings)
    hashes = problem_hashes(splits(settings), task)
    for sentence in task.notes(list(curriculum(settings).problems)):
        note(sentence)
    return hashes


def _training(policy: Policy, settings: Settings, ranks: Solo, device: torch.device) -> Training:
    """A training at step 0, with sharded weights if the settings say so."""
    learner = ranks.own(lambda: shards.sharded(policy, ranks, device)) if settings.ranks.shard else None
    train = settings.train
    optimizer = build_optimizer(learner or policy, name=train.optimizer, weight_decay=train.weight_decay)
    return Training(policy, optimizer, learner)


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


def demonstrated(settings: Settings, ranks: int) -> list[Lesson]:
    """The searches that a warm start imitates, or none; raises CountdownError if there can be none."""
    if not settings.train.warm_start:
        return []
    return lessons(settings, load_tokenizer(model_source(Path(settings.runs), settings.model.model)), ranks=ranks)


def plan_memory(
    settings: Settings, *, ranks: int = 1, free: int = 0, plain: bool = False, whole: bool = False
) -> MemoryPlan:
    """Plan each rank's memory from the model's config and tokenizer. `free` is in bytes; settings override it.

    `plain` and `whole`: the policy's path, once known.
    """
    asked = settings.model
    needs_no_gpu = asked.device == "cuda" and asked.memory > 0
    device = torch.device("cuda") if needs_no_gpu else detect_device(asked.device)
    source = model_source(Path(settings.runs), settings.model.model)
    longest = longest_prompt(settings, partial(encode, load_tokenizer(source)))
    optimizer = choose_optimizer(settings.train.optimizer, device)
    work = memory.Work.of(settings, device=device, optimizer=optimizer, prompt_tokens=longest, ranks=ranks)
    return memory.plan_for(source, work, settings, free=free, plain=plain, whole=whole)


def _lock(run: Run, locks: ExitStack, note: Note) -> None:
    left_by = locks.enter_context(run.locked())
    if left_by is not None:
        note(f"taking over run {run.name}: process {left_by}, which wrote it, no longer holds its lock")


def _load(
    settings: Settings,
    choices: Choices,
    folder: Path | None = None,
    name: str | None = None,
    adapter: Lora | None = None,
    note: Note = lambda _: None,
) -> Policy:
    """Load the model `name`, by default the one to train, or its checkpoint in `folder`."""
    name = name or settings.model.model
    return load_checked(
        str(folder or model_source(Path(settings.runs), name)),
        name=name,
        device=settings.model.device,
        precision=settings.model.precision,
        gradient_checkpointing=choices.checkpointing,
        adapter=adapter,
        note=note,
    )


def _warm_up(
    open_run: Callable[[], Run],
    policy: Policy,
    examples: Sequence[Lesson],
    settings: Settings,
    plan: MemoryPlan,
    hashes: Mapping[str, str],
    control: Control,
    note: Note,
) -> Run:
    """Warm-start the policy, as `warm_start.resumable` does; returns the run, which keeps the model."""
    training = imitation(policy)
    require_space(Path(settings.runs), 2 * training.checkpoint_bytes())
    rows = plan.choices.rows or settings.train.batch_size * settings.train.num_generations  # that are planned
    run = open_run()
    fit, start = _fit(plan, note, rows), origin(policy, None, hashes)
    resumable(training, examples, run, settings, start, fit=fit, control=control, note=note)
    return run


def _fit(plan: MemoryPlan, report: Note, rows: int = 0) -> MicroBatch:
    """The planned micro-batch size, or `rows` if not 0, and the plan's limit."""
    choices = plan.choices
    return MicroBatch(rows or choices.rows, limit=plan.limit, logit_chunk=choices.logit_chunk, report=report)


def _load_planned(
    settings: Settings, past: _Past, plan: MemoryPlan, replan: Callable[..., MemoryPlan], note: Note
) -> tuple[Policy, MemoryPlan]:
    """The policy and its plan; replans if the self-check chose a path that needs more memory."""
    adapter = Lora.of(settings)
    folder = past.checkpoint / "model" if past.checkpoint and not adapter else past.warmed
    load = partial(_load, settings, folder=folder, adapter=adapter, note=note)
    policy, first = load(plan.choices), plan.choices
    if policy.plain or policy.whole:
        plan = replan(plain=policy.plain, whole=policy.whole)
        if plan.choices.checkpointing != first.checkpointing:
            policy = load(plan.choices)
    return policy, plan


def _restore(
    training: Training,
    settings: Settings,
    choices: Choices,
    past: _Past,
    hashes: Mapping[str, str],
    other: Reference | None,
) -> Reference | None:
    """Restore a checkpoint, if there is one, and return the frozen reference, if the loss needs one.

    It is `other`, or else the model that the training started from.
    """
    has_reference = settings.loss.beta > 0
    unchanged = past.checkpoint is None or training.policy.adapter  # an adapter's base model never changes
    original = training.policy if unchanged else _load(settings, choices, past.warmed) if has_reference else None
    reference = other
    if original and has_reference and not other:
        reference = Reference.of(original, on_host=_on_host(settings, choices))
    if past.run and past.checkpoint:
        require_origin(past.run, original, reference, hashes)
        training.restore(past.checkpoint)
    return reference


def _other_reference(settings: Settings, policy: Policy, choices: Choices) -> Reference | None:
    """The model that `ref_model` names, or None without KL and if the reference is the starting model."""
    name = settings.model.ref_model
    if settings.loss.beta == 0 or name == "same":
        return None
    named = _load(settings, choices, name=name)
    if named.fingerprint()["tokenizer"] != policy.fingerprint()["tokenizer"]:
        raise CountdownError(
            f"`{name}` and `{settings.model.model}` have different tokenizers",
            "choose a `--ref-model` with the same tokenizer",
        )
    return Reference.of(named, on_host=_on_host(settings, choices))


def _on_host(settings: Settings, choices: Choices) -> bool:
    return choices.on_host or settings.ranks.shard
