"""`countdown train --seeds N`: the same training with several seeds, one process after the other, and their summary."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.statistics import bootstrap
from grpo_cli.core.metrics import best_step, evaluations
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.run.folder import Run

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
OWN = ("--seeds", "--seed", "--run")  # options of the command that each process gets its own of


def train_seeds(settings: Settings, name: str, count: int, *, overwrite: bool) -> None:
    """Train runs NAME-SEED from the seed of the settings on; finished ones are kept, unfinished ones resumed.

    Raises CountdownError, before any training, if a run of these names has other settings.
    """
    from grpo_cli.core.run.folder import Run, at
    from grpo_cli.ui import tables

    root, first = Path(settings.runs), settings.train.seed
    runs = {seed: Run(root / f"{name}-{seed}") for seed in range(first, first + count)}
    for seed, run in runs.items():
        Run.check(root, run.name, overwrite=True)
        if run.config_path.is_file() and not overwrite:
            _require_same(run, settings, seed)
    for seed, run in runs.items():
        kept = run.config_path.is_file() and not overwrite
        if kept and run.read_summary():
            show.note(f"run {run.name} is finished")
            continue
        resumed = ["train", "--runs", str(root), "--run", run.name, "--resume"]
        code = _run(resumed if kept else [*_arguments(sys.argv[1:]), "--run", run.name, "--seed", str(seed)])
        if code:
            show.note("the same command goes on from here")
            raise typer.Exit(code)
    rows = [_row(seed, run) for seed, run in runs.items()]
    tables.seeds(rows, {key: bootstrap([row[key] for row in rows]) for key in ("best", "last")})
    show.note(f"curves: countdown plot {' '.join(run.name for run in runs.values())}{at(root)}")


def _require_same(run: Run, settings: Settings, seed: int) -> None:
    """Raise CountdownError unless a run has these settings, its seed and what a resumed run may change aside."""
    from grpo_cli.core.config.resolve import restore
    from grpo_cli.core.config.settings import fixed

    own = fixed(restore(run.read_config(), run.config_path).settings)
    asked = {**fixed(settings), "train.seed": seed}
    for key in (key for key, value in asked.items() if value not in (own[key], "auto")):  # what `auto` means is stored
        raise CountdownError(
            f"run `{run.name}` has another `{key}`: {own[key]}, not {asked[key]}",
            "choose another `--run`, or replace it with `--overwrite`",
        )


def _arguments(given: Sequence[str]) -> list[str]:
    """The words of a command line without the options of `OWN` and their values."""
    kept, words = list[str](), iter(given)
    for word in words:
        if word in OWN:
            next(words, None)
        elif word.partition("=")[0] not in OWN:
            kept.append(word)
    return kept


def _run(arguments: Sequence[str]) -> int:
    """The exit code of `countdown ARGUMENTS` in a process of its own, which gets this one's signals."""
    with subprocess.Popen([sys.executable, "-m", "grpo_cli", *arguments], start_new_session=True) as process:
        numbers = [getattr(signal, name) for name in FORWARDED]
        before = {number: signal.signal(number, lambda got, _: process.send_signal(got)) for number in numbers}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _row(seed: int, run: Run) -> Mapping[str, Any]:
    """Val accuracies of one run: of the starting model, the best and the last one."""
    metrics = run.metrics()
    evaluated, best = evaluations(metrics), best_step(metrics)
    accuracies = {step: line["val_accuracy"] for step, line in evaluated.items()}
    found = {"base": accuracies.get(0), "best": accuracies[best], "last": accuracies[max(accuracies)]}
    return {"seed": seed, "run": run.name, "best_step": best, "steps": int(metrics[-1]["step"]), **found}
