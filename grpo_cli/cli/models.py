"""What the commands that run a model share: which model a name means, with which settings, and on which ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from grpo_cli.cli.checks import resolve
from grpo_cli.cli.launch import place
from grpo_cli.cli.options import flags
from grpo_cli.core.config import resolve as config
from grpo_cli.core.config.resolve import Resolved
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.dist.ranks import Solo, join
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.load import detect_device
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.run.folder import Run, find_run
from grpo_cli.core.run.models import model_source
from grpo_cli.core.sampling.selfcheck import load_checked
from grpo_cli.ui import text as show


@dataclass(frozen=True)
class Chosen:
    """A model by its name, the folder or hub id to load it from, and the settings to run it with."""

    name: str
    source: str
    settings: Settings


def choose(ctx: typer.Context, config_file: Path | None, name: str | None) -> Chosen:
    """A run's best model with the run's settings, or a model with a preset's; None means the newest run, or builtin."""
    resolved = resolve_for_model(ctx, config_file)
    root = Path(resolved.settings.runs)
    if name is None:
        newest = Run.newest(root)
        name = newest.name if newest is not None else "builtin"
    run = find_run(root, name)
    if run is not None:
        given = {key: value for key, value in flags(ctx).items() if key not in ("preset", "runs")}
        resolved = config.restore(run.read_config(), run.config_path, flags=given)
    elif name == "builtin" and "preset" not in flags(ctx):
        given = {**flags(ctx), "preset": "builtin"}
        resolved = config.resolve(flags=given, environ=os.environ, config_file=config_file, has_cuda=lambda: False)
    return Chosen(name, model_source(root, name), resolved.settings)


def resolve_for_model(ctx: typer.Context, config_file: Path | None) -> Resolved:
    """The settings of a command that runs a model; the preset may depend on whether there is a GPU."""
    return resolve(ctx, config_file, has_cuda=torch.cuda.is_available)


def load(chosen: Chosen) -> Policy:
    """Load a model for sampling."""
    model = chosen.settings.model
    return load_checked(chosen.source, name=chosen.name, device=model.device, precision=model.precision, note=show.note)


def join_ranks(settings: Settings) -> Solo:
    """Join the processes that a launcher started, each on a GPU of its own; Solo without a launcher."""
    process = place()
    if process.size == 1:
        return Solo()
    device = detect_device(settings.model.device)
    if device.type == "cuda":
        devices = torch.cuda.device_count()
        if process.local_rank >= devices:
            raise CountdownError(
                f"process {process.local_rank} of this machine has no GPU of its own: there are {devices}",
                "start one process per GPU with `--nproc-per-node`",
            )
        torch.cuda.set_device(process.local_rank)
    return join(process.rank, process.size, device=device, timeout=settings.ranks.timeout, attempt=process.restarts)
