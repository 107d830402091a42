"""`countdown train`: start or resume a training, show its progress, and update its curves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import typer

from grpo_cli.cli.checks import Chosen, require_package, resolve_for_model, resumed
from grpo_cli.cli.export import write_card
from grpo_cli.cli.launch import Place, Signals, ignoring_requests, place
from grpo_cli.cli.models import at_once, joined, load
from grpo_cli.cli.options import flags, give
from grpo_cli.cli.plot import draw, run_curves
from grpo_cli.core.config.resolve import Resolved
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.evaluate import Evaluator
from grpo_cli.core.model.load import detect_device, prompt_tokens
from grpo_cli.core.rl import probe as probing
from grpo_cli.core.rl.build import build, demonstrated, finish, for_ranks, plan_memory
from grpo_cli.core.rl.observer import Interrupted, Observer, Observers, Validated
from grpo_cli.core.rl.schedule import Problems
from grpo_cli.core.rl.state import choose_optimizer
from grpo_cli.core.rl.train import Trainer
from grpo_cli.core.run.folder import Run, run_name
from grpo_cli.core.run.models import model_source
from grpo_cli.core.sampling.params import SamplingParams
from grpo_cli.core.sampling.rollout import Engine
from grpo_cli.core.task.audit import audit
from grpo_cli.core.task.countdown import task_of
from grpo_cli.ui import tables
from grpo_cli.ui import text as show
from grpo_cli.ui.live import TrainingView


def run(
    ctx: typer.Context,
    *,
    run: str | None,
    resume: bool,
    step: int | None,
    overwrite: bool,
    dry_run: bool,
    batch_size_per_rank: int | None,
    probe: bool,
    config: Path | None,
) -> None:
    """Train, print the plan (`dry_run`), or probe the starting model (`probe`)."""
    process = place()
    _set_batch_size(ctx, batch_size_per_rank, process)
    resolved = resolve_for_model(ctx, config)
    root = Path(resolved.settings.runs)
    run = None if run is None else run_name(root, run)
    if process.restarts and run is not None:
        overwrite, resume = True, Run(root / run).config_path.is_file()
    if resume and run is not None:
        resolved = resumed(ctx, root, run)
    if not dry_run:  # a dry run shows it above the settings
        show.note(f"preset {resolved.settings.preset}: {resolved.preset_reason}")
    model = resolved.settings.model
    chosen = Chosen(model.model, model_source(root, model.model), resolved.settings)
    if model.ref_model != "same":
        model_source(root, model.ref_model)
    if dry_run:
        _show_plan(resolved, chosen, process)
    if probe and process.rank == 0:
        _probe(chosen)
    if dry_run or probe:
        return
    require_package("matplotlib")
    settings = resolved.settings.model_copy(update={"runs": str(root)})  # the run may have moved
    if choose_optimizer(settings.train.optimizer, detect_device(model.device)) == "adamw8bit":
        require_package("bitsandbytes")
    signals = Signals(launched=process.size > 1)
    try:
        with ignoring_requests(), joined(settings) as world:
            is_first = world.is_first
            view = TrainingView(settings.train.num_iterations) if is_first else None
            observer = Observers([view, _Files(settings, view.message)]) if view else Observer()
            with (
                view or nullcontext(),
                build(
                    settings,
                    run,
                    overwrite=overwrite,
                    resume=resume,
                    step=step,
                    world=world,
                    observer=observer,
                    control=signals,
                ) as trainer,
            ):
                _train(trainer)
    except Interrupted:
        sys.exit(128 + (signals.stop or signal.SIGTERM))


class _Files(Observer):
    """Rewrites the run's curves and model card after each evaluation."""

    def __init__(self, settings: Settings, report: Callable[[str], None]) -> None:
        self._style, self._report = settings.plot, report
        self._run: Run | None = None

    def begin(self, run: Run, step: int) -> None:
        self._run = run

    def evaluated(self, result: Validated) -> None:
        if self._run and result.step:
            run = self._run
            self._attempt(lambda: write_card(run), "the model card was not written")
            self._attempt(lambda: draw([run_curves(run)], run.path, self._style), "the curves were not drawn")

    def _attempt(self, write: Callable[[], object], failure: str) -> None:
        try:
            write()
        except Exception as problem:  # a training never depends on its plots, whatever matplotlib raises
            self._report(f"{failure}: {problem}")


def _train(trainer: Trainer) -> None:
    """Train to the end or until a signal; show the result."""
    run, state, world = trainer.run, trainer.state, trainer.world
    policy, step = state.policy, state.progress.step
    among = f", by {world.size} processes" if world.size > 1 else ""
    trainer.observer.message(
        f"run {run.path}: {policy.name} on {policy.device}, {policy.precision}, from step {step}{among}"
    )
    if trainer.memory:
        trainer.observer.message(tables.memory_line(trainer.memory))
    try:
        result = finish(trainer)
    except Interrupted:
        trainer.observer.message(f"stopped after step {state.progress.step}; resume with: {run.resume_command}")
        raise
    if world.is_first:
        write_card(run)
        tables.training_summary(result.summary, run.path, overlap=result.overlap)


def _set_batch_size(ctx: typer.Context, per_rank: int | None, process: Place) -> None:
    """Set the total batch size from a batch size per rank; it stays the same across restarts."""
    if per_rank is None or process.restarts:
        return
    if "train.batch_size" in flags(ctx):
        raise CountdownError("`--batch-size` and `--batch-size-per-rank` exclude each other", "leave one of them out")
    give(ctx, "train.batch_size", per_rank * process.size)


def _show_plan(resolved: Resolved, chosen: Chosen, process: Place) -> None:
    """Print every setting with its source, the first prompt as token ids, and the memory plan."""
    settings = for_ranks(chosen.settings, process.size)
    problems = Problems.of(settings)
    demonstrated(settings, problems)
    tables.config_table(resolved)
    task = problems.task
    for sentence in problems.notes():
        show.note(sentence)
    if settings.task.task != "countdown":
        for check in audit(task, settings.task.numbers):
            show.note(f"{'passed' if check.passed else 'FAILED'}: {check.name} {check.result}")
    puzzle, style = problems.curriculum.prompts(1)[0]
    tables.prompt_tokens(prompt_tokens(chosen.source, task.prompt(puzzle, style)))
    tables.memory_plan(plan_memory(settings, problems, ranks=process.size))


def _probe(chosen: Chosen) -> None:
    """Sample the starting model in every style as training would, and show how much it can learn."""
    asked, settings, task = chosen.settings.task, chosen.settings.train, task_of(chosen.settings)
    engine = Engine(load(chosen))
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
                at_once(chosen.settings),
            ),
            probing.chosen_puzzles(task.problems("train", asked.numbers), settings.seed),
            chosen=asked.style,
            progress=advance,
        )
    tables.probe(result)
