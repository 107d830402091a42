"""Resolve a model's name to a folder or hub id: a run's name is that run's best model. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.names import require_model
from grpo_cli.core.run.folder import find_run, suggestion


def model_source(root: Path, name: str) -> str:
    """The folder or hub id to load a model from; raises CountdownError if there is no such model."""
    run = find_run(root, name)
    if run is None:
        require_model(name, suggestion=suggestion(root, name))
        return name
    if not run.model_path.is_dir():
        saved = run.checkpoints()
        if saved and run.read_summary() is not None:  # resuming a finished run saves no model
            folder = run.checkpoint_path(max(step for step, _ in saved)) / "model"
            raise CountdownError(f"`{run.model_path}` is gone", f"the model of the last checkpoint is `{folder}`")
        raise CountdownError(f"run `{run.name}` has no saved model yet", f"resume it with `{run.resume_command}`")
    return str(run.model_path)
