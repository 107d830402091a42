"""What the commands share and needs no model: resolved settings, and checks before any work begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import typer

from grpo_cli.cli.options import flags
from grpo_cli.core.config import resolve as config
from grpo_cli.core.config.resolve import Resolved
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.run.folder import can_write


def resolve(ctx: typer.Context, config_file: Path | None, *, has_cuda: Callable[[], bool] = lambda: False) -> Resolved:
    """The settings of this invocation. `has_cuda` helps to choose a preset, where the command loads a model."""
    return config.resolve(flags=flags(ctx), environ=os.environ, config_file=config_file, has_cuda=has_cuda)


def require_package(package: str) -> None:
    """Raise CountdownError if a package is missing that is only imported later."""
    if find_spec(package) is None:
        raise CountdownError(
            f"the package `{package}` is not installed", "install `countdown` again, with all it needs"
        )


def require_writable(path: Path, *, overwrite: bool) -> None:
    """Raise CountdownError if a result could not be written to `path` later."""
    if not path.parent.is_dir():
        raise CountdownError(f"`{path.parent}` is not a folder", "make it, or write elsewhere")
    if path.is_dir():
        raise CountdownError(f"`{path}` is a folder", "name a file in it")
    if path.exists() and not overwrite:
        raise CountdownError(f"`{path}` exists", "write elsewhere, or replace it with `--overwrite`")
    if not can_write(path if path.exists() else path.parent):
        raise CountdownError(f"`{path}` cannot be written", "write elsewhere, or change its permissions")
