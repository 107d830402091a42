"""Resolve a model's name to a folder or hub id: a run's name means that run's best model."""

from __future__ import annotations

from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.load import find
from grpo_cli.core.run.folder import Run, list_runs


def run_named(root: Path, name: str) -> Run | None:
    """The run `name` of `root`, if there is one."""
    return next((run for run in list_runs(root) if run.name == name), None)


def model_source(root: Path, name: str) -> str:
    """The folder or hub id to load a model from; raises CountdownError if there is no such model."""
    run = run_named(root, name)
    if run is None:
        find(name)
        return name
    if not run.model_path.is_dir():
        raise CountdownError(
            f"run `{name}` has no saved model yet", f"resume it with `countdown train --run {name} --resume`"
        )
    return str(run.model_path)
