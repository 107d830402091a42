"""`countdown study`: train several conditions with several seeds, and say which of them differ."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_cli.cli.options import ConfigFile, Json, Overwrite, read_files, require_package, resolve
from grpo_cli.cli.seeds import TRAINED, Job, check, train_all, with_seed, words
from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Train
    from grpo_cli.core.evals.study import Study
    from grpo_cli.core.run.logs import Evaluated

SETTINGS = ("runs",)


@dataclass(frozen=True)
class _Planned:
    """A study with its jobs, by condition."""

    study: Study
    jobs: Mapping[str, Sequence[Job]]

    @property
    def all(self) -> list[Job]:
        return [job for jobs in self.jobs.values() for job in jobs]


def study(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="study file, in TOML; see docs/evaluation.md")],
    parallel: Annotated[
        int, typer.Option("--jobs", min=1, help="trainings at a time; they share the cores", metavar="<int>")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what is left to train, how long it takes, what it can show")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="write one HTML page too", metavar="<file>")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Train several conditions with several seeds, and compare each with the first, by seed and by puzzle.

    The same command goes on where it was stopped. Example: countdown study examples/study.toml --jobs 2
    """
    from grpo_cli.core.files import check_writable
    from grpo_cli.ui import study as view

    planned = _plan(ctx, file, config, parallel)
    if html:
        require_package("matplotlib")
        check_writable(html, overwrite=overwrite)
    check(planned.all, overwrite=overwrite)
    _announce(planned, parallel, overwrite=overwrite)
    if dry_run:
        return
    ended = partial(_ended, planned, parallel)
    train_all(planned.all, overwrite=overwrite, parallel=parallel, quiet=parallel > 1 or as_json, ended=ended)
    result = _result(planned)
    if html:
        view.write_page(result, html)
    if as_json:
        show.json_object(result)
    else:
        view.table(result)
    if html:
        show.note(f"written: {html}")


def _plan(ctx: typer.Context, file: Path, config: Path | None, parallel: int) -> _Planned:
    """The study of a file; every condition's settings and files are checked before any training."""
    from grpo_cli.core.evals.study import read_study
    from grpo_cli.core.run.folder import Run
    from grpo_cli.core.run.models import model_source

    study = read_study(file)
    if others := sorted(key for key in set().union(*study.conditions.values()) if key.partition(".")[0] not in TRAINED):
        raise CountdownError(f"`{file}` sets `{others[0]}`, which no training has", f"it may set {', '.join(TRAINED)}")
    threads = {"model.threads": max(1, (os.cpu_count() or 1) // parallel)} if parallel > 1 else {}
    jobs: dict[str, list[Job]] = {}
    for name, own in study.conditions.items():
        given = {**threads, **own}
        try:
            settings = resolve(ctx, config, given).settings
            for model in {settings.model.model, settings.model.ref_model} - {"same"}:
                model_source(Path(settings.runs), model)
            read_files(settings)
        except CountdownError as problem:
            raise CountdownError(f"condition `{name}` of `{file}`: {problem.message}", problem.hint) from None
        _require_evaluated(name, study.design.step, settings.train)
        line = words(settings, given, config)
        own_jobs = [
            Job(Run(Path(settings.runs) / study.run_name(name, seed)), with_seed(settings, seed), line)
            for seed in study.seeds
        ]
        if same := [other for other, those in jobs.items() if those[0].settings == own_jobs[0].settings]:
            raise CountdownError(
                f"conditions `{same[0]}` and `{name}` of `{file}` are the same training", "remove one, or change it"
            )
        jobs[name] = own_jobs
    lengths = {own[0].settings.train.num_iterations for own in jobs.values()}
    if study.design.step is None and len(lengths) > 1:
        raise CountdownError(
            f"the conditions of `{file}` train for {' and '.join(map(str, sorted(lengths)))} steps",
            "name the step to compare: `study.step`",
        )
    return _Planned(study, jobs)


def _require_evaluated(condition: str, step: int | None, train: Train) -> None:
    """Raise CountdownError if the training of a condition does not evaluate the step that is compared."""
    every, last = train.eval_every, train.num_iterations
    if step is not None and (step > last or (step % every and step != last)):
        raise CountdownError(
            f"`{condition}` is not evaluated after step {step}, but every {every} steps and after step {last}",
            "change `study.step` or `train.eval_every`",
        )


def _announce(planned: _Planned, parallel: int, *, overwrite: bool) -> None:
    """Say what is left to train, how long it takes, and the smallest difference that can be shown."""
    from grpo_cli.core.evals.study import detectable

    study, jobs = planned.study, planned.all
    finished = [] if overwrite else [job for job in jobs if job.is_finished]
    left = len(jobs) - len(finished)
    counts = f"{show.counted(len(planned.jobs), 'condition')} x {show.counted(study.design.seeds, 'seed')}"
    show.note(f"{counts}: {show.counted(len(jobs), 'training')}, {len(finished)} finished, {left} to do")
    if left:
        rounds = left / parallel
        show.note(_measured(finished, rounds) if finished else _forecast(jobs[0], rounds))
    smallest = detectable(study.design.seeds, len(planned.jobs) - 1, study.design.spread)
    assumed = f"a standard deviation of {100 * study.design.spread:.1f} points (assumed: `study.spread`)"
    deviation = f"if seeds differ by {assumed}"
    if smallest < 1:
        show.note(f"differences of {100 * smallest:.1f} points are found with a probability of 80 %, {deviation}")
    else:
        show.warning(f"no difference can be found with so few seeds, {deviation}")


def _time_left(seconds: float, rounds: float, source: str) -> str:
    return f"time: about {rounds * seconds / 60:,.0f} min, at {seconds:,.0f} s each {source}"


def _measured(finished: Sequence[Job], rounds: float) -> str:
    """The time left, by the trainings that are finished."""
    return _time_left(fmean(sum(_seconds(job)) for job in finished), rounds, "as measured")


def _forecast(job: Job, rounds: float) -> str:
    """The time left before any training is finished, by one step of a `job` in a folder that is removed."""
    from tempfile import TemporaryDirectory

    from grpo_cli.core.run.folder import Run

    train = job.settings.train
    if train.warm_start:
        return "time: known after the first training, which begins with a warm start"
    disk = next(folder for folder in job.run.path.absolute().parents if folder.is_dir())
    with TemporaryDirectory(prefix=".trial-", dir=disk) as folder:
        words = [*job.words, "--runs", folder, "--num-iterations=1", "--eval-every=1", "--tracker=none"]
        trial, began = Job(Run(Path(folder) / "trial"), job.settings, words), time.monotonic()
        train_all([trial], overwrite=False, quiet=True)
        whole, (step, evaluations) = time.monotonic() - began, _seconds(trial)
    count = 1 + math.ceil(train.num_iterations / train.eval_every)
    seconds = whole + (train.num_iterations - 1) * step + (count / 2 - 1) * evaluations
    return _time_left(seconds, rounds, f"by one step of `{job.run.name}`")


def _seconds(job: Job) -> tuple[float, float]:
    """How long the steps and the evaluations of a finished training took.

    Raises CountdownError if its summary does not say.
    """
    spent = (job.run.read_summary() or {}).get("seconds")
    parts = [spent.get(part) for part in ("training", "evaluation")] if isinstance(spent, dict) else []
    known = [float(part) for part in parts if isinstance(part, int | float)]
    if len(known) < 2:
        raise CountdownError(f"`{job.run.path / 'summary.json'}` does not say how many seconds the training took")
    return known[0], known[1]


def _ended(planned: _Planned, parallel: int, job: Job) -> None:
    """Note the accuracy of a training that ended, and the time left."""
    finished = [job for job in planned.all if job.is_finished]
    accuracy, count = show.percent(_evaluated(planned, job).accuracy), len(planned.all)
    left = f"; {_measured(finished, (count - len(finished)) / parallel)}" if len(finished) < count else ""
    show.note(f"{job.run.name}: {accuracy}; {len(finished)} of {count} finished{left}")


def _evaluated(planned: _Planned, job: Job) -> Evaluated:
    """The evaluation of a run that the study compares, on its first val cell."""
    cells = [cell for name, cell in job.run.evaluations().items() if not name.startswith("dev ")]
    step = planned.study.design.step or max(cells[0])
    if step not in cells[0]:
        raise CountdownError(
            f"run `{job.run.name}` has no evaluation after step {step}",
            f"choose `study.step` from {', '.join(map(str, sorted(cells[0])[1:]))}",
        )
    return cells[0][step]


def _result(planned: _Planned) -> dict[str, object]:
    """The study's differences, curves and settings as one JSON object."""
    from grpo_cli.core.evals.study import compare

    evaluated = {name: [_evaluated(planned, job) for job in jobs] for name, jobs in planned.jobs.items()}
    answered = {one.puzzles for own in evaluated.values() for one in own}
    if len(answered) > 1:
        hint = "give them the same `train.eval_puzzles` and [task] settings"
        raise CountdownError("the conditions were evaluated on different puzzles", hint)
    if len(steps := {one.step for own in evaluated.values() for one in own}) > 1:  # by `train.patience`
        raise CountdownError(
            f"the last evaluations are those of steps {', '.join(map(str, sorted(steps)))}",
            "name the step to compare: `study.step`",
        )
    one = next(iter(evaluated.values()))[0]
    rows = [row.record() for row in compare({name: [one.solved for one in own] for name, own in evaluated.items()})]
    for row, own in zip(rows, evaluated.values(), strict=True):
        row["accuracies"] = [one.accuracy for one in own]
    return {
        "study": planned.study.name,
        "cell": one.cell,
        "count": one.count,
        "step": one.step,
        "seeds": list(planned.study.seeds),
        "conditions": rows,
        "settings": {name: dict(own) for name, own in planned.study.conditions.items()},
        "seconds": sum(sum(_seconds(job)) for job in planned.all),
        "curves": {name: [_curve(job) for job in jobs] for name, jobs in planned.jobs.items()},
    }


def _curve(job: Job) -> list[tuple[int, float]]:
    """(step, val accuracy) of every evaluation of a run."""
    from grpo_cli.core.metrics import evaluations

    return [(step, line["val_accuracy"]) for step, line in evaluations(job.run.metrics()).items()]
