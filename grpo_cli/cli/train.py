"""`countdown train`: start or resume a training, show its progress, and update its curves."""

from __future__ import annotations

import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_cli.cli.artifacts import Artifacts, account_of, write_card
from grpo_cli.cli.launch import ProcessInfo, Signals, ignoring_requests, joined, process_info
from grpo_cli.cli.models import ModelChoice, import_libraries, load, micro_batch_of, warn_of_folder
from grpo_cli.cli.options import (
    ConfigFile,
    Overwrite,
    completion,
    flags,
    read_files,
    require_engine,
    require_package,
    resolve,
)
from grpo_cli.cli.seeds import TRAINED, train_seeds, words
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.rl.observer import Interrupted, Observer, Observers
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.resolve import Resolved
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.rl.train import Trainer
    from grpo_cli.core.task.task import Task

SETTINGS = TRAINED


RunName = Annotated[
    str | None,
    typer.Option(
        help="name of the run; default: run-1, run-2, ...", metavar="<name>", autocompletion=completion("run")
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue --run from its last checkpoint")]
Step = Annotated[int | None, typer.Option(min=1, help="with --resume: continue from this checkpoint", metavar="<int>")]
Seeds = Annotated[
    int,
    typer.Option(
        min=1, max=1000, help="train so many runs, NAME-SEED, from --seed on, and sum them up", metavar="<int>"
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="show whether it fits in memory, its settings and a prompt; do not train")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="with --dry-run: all settings, token ids and the memory plan")
]
Probe = Annotated[
    bool, typer.Option("--probe", help="sample the starting model and estimate what it can learn; do not train")
]


def train(
    ctx: typer.Context,
    run: RunName = None,
    resume: Resume = False,
    step: Step = None,
    overwrite: Overwrite = False,
    seeds: Seeds = 1,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    probe: Probe = False,
    config: ConfigFile = None,
) -> None:
    """Train a model with GRPO.

    Ctrl-C saves a checkpoint and stops; SIGUSR1 saves one and continues.

    Example: countdown train --run first --num-iterations 100
    """
    process = process_info()
    if resume and (run is None or overwrite):
        raise CountdownError("`--resume` needs the name of a run, and no `--overwrite`", "say `--run NAME --resume`")
    _require_one_purpose(resume=resume, step=step, dry_run=dry_run, probe=probe, trains=seeds > 1 or overwrite)
    if seeds > 1 and (run is None or resume or process.size > 1):
        raise CountdownError(
            "`--seeds` needs `--run NAME`, no `--resume`, and one process",
            "the same command resumes what is unfinished",
        )
    # A flag may need another setting, which a resumed run has already.
    resolved = resolve(ctx, config, at_most=("runs",) if resume else None)
    root = Path(resolved.settings.runs)
    run, resume, overwrite = _run_to_open(root, run, process, resume=resume, overwrite=overwrite)
    if resume and run is not None:
        resolved = _resumed(ctx, root, run)
    settings = resolved.settings.model_copy(update={"runs": str(root)})  # the run may have moved
    if settings.train.seed + seeds > 2**32:
        raise CountdownError(f"{seeds} seeds from {settings.train.seed} on go beyond 4294967295", "lower `--seed`")
    chosen = _chosen(settings, resume=resume)
    task = read_files(settings)
    if dry_run:
        _show_plan(resolved, chosen, task, process, verbose=verbose)
        return
    if seeds > 1 and not probe:
        train_seeds(settings, run or "", seeds, words(settings, flags(ctx), config), overwrite=overwrite)
        return
    show.note(f"preset {settings.preset}: {resolved.preset_reason}")
    if probe:
        if process.rank == 0:
            _probe(chosen, task)
        return
    _train(settings, task, run, process, overwrite=overwrite, resume=resume, step=step)


def _require_one_purpose(*, resume: bool, step: int | None, dry_run: bool, probe: bool, trains: bool) -> None:
    """Raise CountdownError for options that exclude each other."""
    if dry_run and probe:
        raise CountdownError("`--dry-run` and `--probe` exclude each other", "leave one of them out")
    if step is not None and not resume:
        raise CountdownError("`--step` names a checkpoint to resume from", "say `--run NAME --resume --step STEP`")
    if probe and (trains or resume):
        raise CountdownError("`--probe` trains nothing", "leave out `--resume`, `--seeds` and `--overwrite`")


def _run_to_open(
    root: Path, name: str | None, process: ProcessInfo, *, resume: bool, overwrite: bool
) -> tuple[str | None, bool, bool]:
    """The name of the run, whether to resume it, and whether to overwrite it: a launcher restarts the same line."""
    from grpo_cli.core.run.folder import Run, run_name

    if process.max_restarts and name is None:
        raise CountdownError("a training with restarts needs a run name", "name it with `--run`")
    if not resume and not process.restarts:
        Run.check(root, name, overwrite=overwrite)
    if name is None:
        return None, resume, overwrite
    name = run_name(root, name)
    if process.restarts:
        return name, Run(root / name).config_path.is_file(), True
    return name, resume, overwrite


def _resumed(ctx: typer.Context, root: Path, name: str) -> Resolved:
    """The settings of a run to resume, with the changes that the flags make."""
    from grpo_cli.core.config.resolve import resume_settings
    from grpo_cli.core.run.folder import Run

    run = Run.open(root, name)
    given = {key: value for key, value in flags(ctx).items() if key != "runs"}
    return resume_settings(run.read_config(), run.config_path, flags=given)


def _chosen(settings: Settings, *, resume: bool) -> ModelChoice:
    """The model to train; raises CountdownError if it or the reference does not exist."""
    from grpo_cli.core.run.models import model_source

    model, root = settings.model, Path(settings.runs)
    if not resume:
        warn_of_folder(root, model.model)
        if settings.train.warm_start and model.model == "builtin":
            show.warning("`builtin` already answers in this format: a warm start teaches it another way to search")
    if model.ref_model != "same":
        model_source(root, model.ref_model)
    return ModelChoice(model.model, model_source(root, model.model), settings)


def _train(
    settings: Settings,
    task: Task,
    run: str | None,
    process: ProcessInfo,
    *,
    overwrite: bool,
    resume: bool,
    step: int | None,
) -> None:
    """Train to the end, or until a signal stops it."""
    import_libraries()
    from grpo_cli.core.model.load import detect_device
    from grpo_cli.core.rl.build import build
    from grpo_cli.core.rl.context import Context
    from grpo_cli.core.rl.state import choose_optimizer
    from grpo_cli.ui.live import TrainingView

    require_package("matplotlib")
    require_engine(settings)
    if choose_optimizer(settings.train.optimizer, detect_device(settings.model.device)) == "adamw8bit":
        require_package("bitsandbytes")
    signals, is_prepared = Signals(launched=process.size > 1), False
    try:
        with ignoring_requests(), joined(settings) as world:
            view = TrainingView(settings.train.num_iterations) if world.is_first else None
            observer = Observers([view, Artifacts(view.message)]) if view else Observer()
            opening = build(
                settings,
                run,
                task=task,
                overwrite=overwrite,
                resume=step or resume,
                context=Context(world, observer, signals),
            )
            with view or nullcontext(), opening as trainer:
                is_prepared = True
                _finish(trainer)
    except Interrupted:
        sys.exit(128 + (signals.stop or signal.SIGTERM))
    except SystemExit:
        if not is_prepared:
            show.note("interrupted before the first step; `countdown runs` lists what is kept, such as a warm start")
        raise


def _finish(trainer: Trainer) -> None:
    """Train to the end or until a signal; show the result."""
    from grpo_cli.core.rl.build import finish
    from grpo_cli.ui import tables
    from grpo_cli.ui.account import verdict

    run, state, world, tell = trainer.run, trainer.state, trainer.world, trainer.observer.message
    policy, step = state.policy, state.progress.step
    among = f", by {world.size} processes" if world.size > 1 else ""
    tell(f"run {run.path}: {policy.name} on {policy.device}, {policy.precision}, from step {step}{among}")
    if step >= (steps := trainer.settings.train.num_iterations):
        tell(f"all {steps} steps are done; train on with: {run.resume_command} --num-iterations {2 * steps}")
    if trainer.settings.train.broken != "none":
        tell(f"warning: a bug is planted on purpose: `--break {trainer.settings.train.broken}`")
    if trainer.memory:
        tell(tables.memory_line(trainer.memory))
    try:
        result = finish(trainer)
    except Interrupted:
        tell(f"stopped after step {state.progress.step}; resume with: {run.resume_command}")
        raise
    if world.is_first:
        write_card(run)
        change = verdict(account_of(run))
        tables.training_summary(result.summary, run.path, overlap=result.overlap, change=change)


def _show_plan(resolved: Resolved, chosen: ModelChoice, task: Task, process: ProcessInfo, *, verbose: bool) -> None:
    """Print whether the training fits, what differs from the preset, and a prompt; with `verbose` everything else."""
    from grpo_cli.core.model.load import prompt_tokens
    from grpo_cli.core.rl.build import demonstrated, for_ranks, plan_memory
    from grpo_cli.core.rl.schedule import Problems
    from grpo_cli.core.run.models import model_source
    from grpo_cli.core.task.audit import audit
    from grpo_cli.ui import tables

    settings = for_ranks(chosen.settings, process.size)
    problems = Problems.of(settings, task)
    demonstrated(settings, problems)
    for sentence in problems.notes():
        show.note(sentence)
    if settings.task.task != "countdown":
        for check in audit(task, settings.task.numbers):
            show.note(f"{'passed' if check.passed else 'FAILED'}: {check.name} {check.result}")
    plan = plan_memory(settings, problems, ranks=process.size)
    puzzle, style = problems.curriculum.prompts(1)[0]
    source = model_source(Path(settings.runs), settings.model.model)
    tokens = prompt_tokens(source, task.prompt(puzzle, style))
    tables.plan_summary(resolved, plan, "".join(piece for _, piece in tokens))
    if verbose:
        tables.config_table(resolved)
        tables.prompt_tokens(tokens)
        tables.memory_plan(plan)


def _probe(chosen: ModelChoice, task: Task) -> None:
    """Sample the starting model in every style as training would, and show how much it can learn."""
    from grpo_cli.core.evals.evaluate import Evaluator
    from grpo_cli.core.rl import probe as probing
    from grpo_cli.core.rollout.make import make_engine
    from grpo_cli.core.rollout.params import SamplingParams
    from grpo_cli.ui import tables

    asked, settings = chosen.settings.task, chosen.settings.train
    engine = make_engine(load(chosen), chosen.settings, max_new_tokens=settings.max_new_tokens)
    if settings.warm_start:
        show.note("the probe samples the model as it is before the warm start")
    with tables.progress(f"probing {chosen.name}", quiet=False) as advance:
        result = probing.probe(
            Evaluator(
                engine,
                SamplingParams.training(settings),
                task,
                settings.batch_size * settings.num_generations,
                settings.seed,
                micro_batch_of(chosen.settings),
            ),
            probing.chosen_puzzles(task.problems("train", asked.numbers), settings.seed),
            chosen=asked.style,
            progress=advance,
        )
    tables.probe(result)
