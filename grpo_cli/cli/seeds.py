"""Several trainings, each in a process of its own: `countdown train --seeds N`, and the runs of a study."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.statistics import bootstrap
from grpo_cli.core.metrics import best_step, evaluations
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.run.folder import Run

TRAINED = ("preset", "runs", "task", "model", "train", "loss", "reward", "ranks")  # settings of a training
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOPPED = (130, 143)  # exit codes of a training that was told to stop, and says how to go on
LAST_CHARACTERS = 2_000  # of the output of a failed process


@dataclass(frozen=True)
class Job:
    """A training: its run, its settings, and the words of `countdown` that start it."""

    run: Run
    settings: Settings
    words: Sequence[str]

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended, after all the steps that are asked for."""
        steps = self.settings.train.num_iterations
        if not self.run.config_path.is_file() or self.run.read_summary() is None:
            return False
        return self.run.settings.train.num_iterations >= steps

    def line(self, *, overwrite: bool) -> list[str]:
        """The command line that starts the run anew, or resumes it."""
        root = str(self.run.path.parent)
        if self.run.config_path.is_file() and not overwrite:
            return ["train", "--runs", root, "--run", self.run.name, "--resume", *self._changes()]
        seed = str(self.settings.train.seed)
        return [*self.words, *["--overwrite"] * overwrite, "--run", self.run.name, "--seed", seed]

    def _changes(self) -> list[str]:
        """What a resumed run may change, as far as the job's settings differ from the run's."""
        from grpo_cli.core.config.resolve import as_option
        from grpo_cli.core.config.settings import changeable

        own, asked = changeable(self.run.settings), changeable(self.settings)
        keys = [key for key in asked if "." in key and key.partition(".")[0] in TRAINED and asked[key] != "auto"]
        return [as_option(key, asked[key]) for key in keys if asked[key] != own[key]]


def words(settings: Settings, given: Mapping[str, object], config: Path | None) -> list[str]:
    """The words of a training with the `given` settings, without its run and seed."""
    from grpo_cli.core.config.resolve import as_option

    file = ["--config", str(config)] if config else []
    options = [as_option(key, value) for key, value in given.items() if key not in ("runs", "train.seed")]
    return ["train", *file, "--runs", settings.runs, *options]


def train_seeds(settings: Settings, name: str, count: int, line: Sequence[str], *, overwrite: bool) -> None:
    """Train runs NAME-SEED from the seed of the settings on; finished ones are kept, unfinished ones resumed.

    Raises CountdownError, before any training, if a run of these names has other settings.
    """
    from grpo_cli.core.run.folder import Run, at
    from grpo_cli.ui import tables

    root, first = Path(settings.runs), settings.train.seed
    jobs = [Job(Run(root / f"{name}-{seed}"), with_seed(settings, seed), line) for seed in range(first, first + count)]
    train_all(jobs, overwrite=overwrite)
    rows = [_row(job) for job in jobs]
    tables.seeds(rows, {key: bootstrap([row[key] for row in rows]) for key in ("best", "last")})
    show.note(f"curves: countdown plot {' '.join(job.run.name for job in jobs)}{at(root)}")


def with_seed(settings: Settings, seed: int) -> Settings:
    return settings.model_copy(update={"train": settings.train.model_copy(update={"seed": seed})})


def check(jobs: Sequence[Job], *, overwrite: bool) -> None:
    """Raise CountdownError for a name that no run can have, and for a run that has other settings."""
    from grpo_cli.core.run.folder import Run

    for job in jobs:
        Run.check(job.run.path.parent, job.run.name, overwrite=True)
        if job.run.config_path.is_file() and not overwrite:
            _require_same(job)


def train_all(
    jobs: Sequence[Job],
    *,
    overwrite: bool,
    parallel: int = 1,
    quiet: bool = False,
    ended: Callable[[Job], None] = lambda job: None,
) -> None:
    """Train what is not finished, `parallel` at a time; `quiet` ones show their output only if they fail.

    The first failure starts no more, waits for the others, and exits with its code.
    """
    check(jobs, overwrite=overwrite)
    kept = [] if overwrite else [job for job in jobs if job.is_finished]
    for job in kept:
        show.note(f"run {job.run.name} is finished")
    due = [job for job in jobs if job not in kept]
    lines = [job.line(overwrite=overwrite) for job in due]
    if code := _run(lines, parallel, quiet=quiet, ended=lambda place: ended(due[place])):
        show.note("the same command goes on from here")
        raise typer.Exit(code)


def _require_same(job: Job) -> None:
    """Raise CountdownError unless the run has the job's settings, what a resumed run may change aside."""
    from grpo_cli.core.config.settings import fixed

    steps, least = job.run.settings.train.num_iterations, job.settings.train.num_iterations
    if steps > least:
        raise CountdownError(
            f"run `{job.run.name}` has {steps} steps, more than {least}",
            "choose another name, or replace it with `--overwrite`",
        )
    own, asked = fixed(job.run.settings), fixed(job.settings)
    for key in (key for key, value in asked.items() if value not in (own[key], "auto")):  # what `auto` means is stored
        raise CountdownError(
            f"run `{job.run.name}` has another `{key}`: {own[key]}, not {asked[key]}",
            "choose another name, or replace it with `--overwrite`",
        )


def _run(lines: Sequence[Sequence[str]], parallel: int, *, quiet: bool, ended: Callable[[int], None]) -> int:
    """Run `countdown LINE` for each line; the exit code of the first that fails, or 0.

    The processes get this one's signals. `ended` is told the place of each line that succeeds.
    """
    from tempfile import TemporaryFile

    waiting, running, code = deque(enumerate(lines)), dict[int, subprocess.Popen[bytes]](), 0
    output = dict[int, IO[bytes] | None]()

    def forward(number: int, _: object) -> None:
        nonlocal code
        code = code or (0 if number == signal.SIGUSR1 else 128 + number)
        for process in running.values():
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (getattr(signal, name) for name in FORWARDED)}
    try:
        while running or (waiting and not code):
            while waiting and len(running) < parallel and not code:
                place, line = waiting.popleft()
                stream: IO[bytes] | None = TemporaryFile() if quiet else None  # noqa: SIM115 (closed with the process)
                output[place], command = stream, [sys.executable, "-m", "grpo_cli", *line]
                running[place] = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
            for place in [place for place, process in running.items() if process.poll() is not None]:
                if failed := running.pop(place).returncode:
                    code = code or (failed if failed > 0 else 128 - failed)
                    if failed not in STOPPED:
                        _show_end(output[place])
                else:
                    ended(place)
                if stream := output.pop(place):
                    stream.close()
            time.sleep(0.1)
    finally:
        for process in running.values():  # `ended` has raised
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _show_end(stream: IO[bytes] | None) -> None:
    """Show the last lines of a failed process."""
    if stream:
        stream.seek(0)
        show.note(stream.read().decode(errors="replace")[-LAST_CHARACTERS:].strip())


def _row(job: Job) -> Mapping[str, Any]:
    """Val accuracies of one run: of the starting model, the best and the last one."""
    metrics = job.run.metrics()
    evaluated, best = evaluations(metrics), best_step(metrics)
    accuracies = {step: line["val_accuracy"] for step, line in evaluated.items()}
    found = {"base": accuracies.get(0), "best": accuracies[best], "last": accuracies[max(accuracies)]}
    own = {"seed": job.settings.train.seed, "run": job.run.name}
    return own | {"at step": best, "steps": int(metrics[-1]["step"]), **found}
