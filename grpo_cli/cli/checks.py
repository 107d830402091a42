"""Settings and early checks shared by commands. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from grpo_cli.cli.launch import place
from grpo_cli.cli.options import flags
from grpo_cli.core.config import resolve as config
from grpo_cli.core.config.resolve import Resolved, flag, require_suite
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import check_writable
from grpo_cli.core.rl.schedule import Problems, learning_rate_at
from grpo_cli.core.run.folder import Run, find_run, require_outside_runs
from grpo_cli.core.run.models import model_source
from grpo_cli.core.task.countdown import task_of
from grpo_cli.core.task.files import load_puzzles
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.question import parse, read_question
from grpo_cli.core.task.rules import OPERATIONS, Rules
from grpo_cli.core.task.solver import solution
from grpo_cli.ui import text as show


def resolve(ctx: typer.Context, config_file: Path | None, *, has_cuda: Callable[[], bool] = lambda: False) -> Resolved:
    """The settings of this invocation. `has_cuda` selects the preset if the command loads a model."""
    return config.resolve(flags=flags(ctx), environ=os.environ, config_file=config_file, has_cuda=has_cuda)


SUITE_CELL = ("task.style", "task.numbers", "eval.split")  # settings that a suite's cells determine


@dataclass(frozen=True)
class Chosen:
    """A model's name, the folder or hub id to load it from, and its settings."""

    name: str
    source: str
    settings: Settings


def choose(ctx: typer.Context, config_file: Path | None, name: str | None) -> Chosen:
    """A run's best model with the run's settings, or a model with a preset's; None is the newest run, else builtin."""
    root = Path(resolve(ctx, config_file).settings.runs)
    if name is None:
        newest = Run.newest(root)
        name = newest.name if newest is not None else "builtin"
    run = find_run(root, name)
    if run is not None:
        given = {key: value for key, value in flags(ctx).items() if key not in ("preset", "runs")}
        resolved = config.restore(run.read_config(), run.config_path, flags=given)
    elif name == "builtin" and "preset" not in flags(ctx):
        given = {**flags(ctx), "preset": "builtin"}
        resolved = config.resolve(flags=given, environ=os.environ, config_file=config_file)
    else:
        resolved = resolve_for_model(ctx, config_file)
    return Chosen(name, model_source(root, name), resolved.settings)


def evaluated(ctx: typer.Context, chosen: Chosen) -> Chosen:
    """With `--puzzles` and no `--split`, the whole file is evaluated, unless its rows say which are val."""
    settings, task = chosen.settings, chosen.settings.task
    if "task.puzzles" not in flags(ctx) or "eval.split" in flags(ctx):
        return chosen
    if task.puzzles == "none" or task.val_puzzles != "none":
        return chosen
    if load_puzzles(Path(task.puzzles), task.rules, unmarked="train").rows["val"]:
        return chosen
    whole = task.model_copy(update={"puzzles": "none", "val_puzzles": task.puzzles})
    return replace(chosen, settings=settings.model_copy(update={"task": whole}))


def resolve_for_model(ctx: typer.Context, config_file: Path | None) -> Resolved:
    """The settings of a command that runs a model; the preset may depend on whether there is a GPU."""

    def has_cuda() -> bool:
        import torch

        return torch.cuda.is_available()

    return resolve(ctx, config_file, has_cuda=has_cuda)


def require_package(package: str) -> None:
    """Raise CountdownError if a package that is imported later is missing."""
    if find_spec(package) is None:
        raise CountdownError(
            f"the package `{package}` is not installed", "install `countdown-grpo` again, with all it needs"
        )


def require_models(options: Mapping[str, Any]) -> None:
    """Raise CountdownError if a named model does not exist, before torch is imported."""
    settings = resolve(options["ctx"], options["config"]).settings
    root, names = Path(settings.runs), list(options.get("models") or [options.get("model")])
    if options.get("resume") is False:
        names = [settings.model.model, settings.model.ref_model]
    for name in names:
        if name not in (None, "same"):
            model_source(root, name)
        if name == "builtin" and os.path.isdir(root / name):
            show.warning(f"`{name}` is the built-in model, not the folder `{root / name}`")


def check_solve(options: Mapping[str, Any]) -> None:
    """Raise CountdownError if the question contains no puzzle, or the puzzle has no solution."""
    question = " ".join(options["question"])
    parse(question)
    rules = choose(options["ctx"], options["config"], options["model"]).settings.task.rules
    puzzle = read_question(question, rules)
    if solution(puzzle, rules) is None:
        use = "every number exactly" if rules.use_all else "each number at most"
        raise CountdownError(
            f"{show.question(puzzle.numbers, puzzle.target)} has no solution with {rules.operations}, {use} once",
            _other_rules(puzzle, rules),
            exit_code=1,
        )


def _other_rules(puzzle: Puzzle, rules: Rules) -> str:
    """The flags under which a puzzle has a solution, as few as possible."""
    for use_all in sorted({rules.use_all, False}, reverse=True):
        for operations in (rules.operations, "+-", "+*", "+-*", "+*/", OPERATIONS):
            wider = replace(rules, operations=operations, use_all=use_all)
            if set(operations) >= set(rules.operations) and (solved := solution(puzzle, wider)):
                added = [f'`--operations "{operations}"`'] * (operations != rules.operations)
                added += ["`--no-use-all`"] * (use_all != rules.use_all)
                return f"{solved} with {' and '.join(added)}"
    return "change a number"


def check_eval(options: Mapping[str, Any]) -> None:
    """Raise CountdownError for conflicting flags and for files that cannot be read or written."""
    if options["as_json"] and options["as_markdown"]:
        raise CountdownError("`--json` and `--markdown` exclude each other", "leave one of them out")
    if options["out"] is not None:
        require_outside_runs(options["out"])
        check_writable(options["out"], overwrite=options["overwrite"])
    if (suite := options["suite"]) is not None:
        for key in SUITE_CELL:
            if key in flags(options["ctx"]):
                raise CountdownError(
                    f"`{flag(key)}` is set by the cells of a suite", "leave out either it or `--suite`"
                )
        without, with_gpu = _either(options)
        if suite not in with_gpu.suite:
            require_suite(without, suite, "`--suite`")
    chosen = choose(options["ctx"], options["config"], next(iter(options["models"] or []), None))
    settings = (chosen if suite else evaluated(options["ctx"], chosen)).settings
    if settings.eval.samples > 1 and settings.eval.temperature == 0:
        raise CountdownError(
            f"`--samples {settings.eval.samples}` needs sampling: greedy completions of a puzzle are all equal",
            "set `--temperature 1` too",
        )
    _read_files(settings)


def check_train(options: Mapping[str, Any]) -> None:
    """Raise CountdownError for conflicting flags, wrong files, and a run that cannot start or resume."""
    run, resume, overwrite, process = options["run"], options["resume"], options["overwrite"], place()
    if resume and (run is None or overwrite):
        raise CountdownError("`--resume` needs the name of a run, and no `--overwrite`", "say `--run NAME --resume`")
    if options["dry_run"] and options["probe"]:
        raise CountdownError("`--dry-run` and `--probe` exclude each other", "leave one of them out")
    if options["step"] is not None and not resume:
        raise CountdownError("`--step` names a checkpoint to resume from", "say `--run NAME --resume --step STEP`")
    if options["probe"] and resume:
        raise CountdownError(
            "`--probe` samples the starting model of a new training",
            "leave out `--resume`, and name the model with `--model`",
        )
    if process.max_restarts and run is None:
        raise CountdownError("a training with restarts needs a run name", "name it with `--run`")
    without, with_gpu = _either(options)
    root = Path(without.runs)
    if resume:
        settings = resumed(options["ctx"], root, run).settings
        _read_files_of(Run.open(root, run), settings)
        _note_rate(Run.open(root, run), settings, options["step"])
        return
    if with_gpu.train.warm_start and "builtin" in (without.model.model, with_gpu.model.model):
        show.warning("`builtin` already answers in this format: a warm start teaches it another way to search")
    if not process.restarts:
        Run.check(root, run, overwrite=overwrite)
    if (without.task, without.reward) == (with_gpu.task, with_gpu.reward):
        _read_files(without)
        if {without.task.puzzles, without.task.dev_puzzles, without.task.val_puzzles} != {"none"}:
            Problems.of(without)


def _either(options: Mapping[str, Any]) -> tuple[Settings, Settings]:
    """The settings without and with a GPU: only torch knows which will run."""
    ctx, file = options["ctx"], options["config"]
    return resolve(ctx, file).settings, resolve(ctx, file, has_cuda=lambda: True).settings


def _read_files(settings: Settings) -> None:
    """Read the puzzle files and run the code files of the settings; later uses reuse the result."""
    for path in (settings.task.task, settings.reward.reward.rpartition(":")[0]):
        if path.endswith(".py") and Path(path).is_file():
            show.note(f"running `{path}`")
    _ = task_of(settings).files


def _read_files_of(run: Run, settings: Settings) -> None:
    """Read a resumed run's files, and find its model; the run may name them relative to another folder."""
    try:
        _read_files(settings)
        model_source(run.path.parent, settings.model.model)
    except CountdownError as error:
        saved, root = Path(str(run.read_config()["runs"])), Path(os.path.realpath(run.path.parent))
        start = Path(*root.parts[: -len(saved.parts)])
        if start / saved != root or start == Path(os.path.realpath(".")):
            raise
        raise CountdownError(error.message, f"resume it in `{start}`, where the run was started") from error


def _note_rate(run: Run, settings: Settings, step: int | None) -> None:
    """Say that the learning rate jumps if the end of its schedule moves."""
    before, after = config.restore(run.read_config(), run.config_path).settings.train, settings.train
    done = step or max((saved for saved, _ in run.checkpoints()), default=0)
    if not done or before.num_iterations == after.num_iterations or after.schedule == "constant":
        return
    last, following = (
        learning_rate_at(
            at,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            num_iterations=train.num_iterations,
        )
        for at, train in ((done, before), (done + 1, after))
    )
    show.note(
        f"the {after.schedule} schedule now ends at step {after.num_iterations}: the learning rate jumps from "
        f"{last:.2g} at step {done} to {following:.2g} at step {done + 1}"
    )


def resumed(ctx: typer.Context, root: Path, name: str) -> Resolved:
    """The settings of a run to resume, with the changes that the flags make."""
    run = Run.open(root, name)
    return config.go_on(
        run.read_config(), run.config_path, flags={key: value for key, value in flags(ctx).items() if key != "runs"}
    )
