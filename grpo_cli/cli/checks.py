"""What the commands share without loading torch: resolved settings, and checks before any work begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from grpo_cli.cli.options import flags
from grpo_cli.core.config import resolve as config
from grpo_cli.core.config.resolve import Resolved
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.run.models import model_source
from grpo_cli.core.task.question import parse
from grpo_cli.ui import text as show


def resolve(ctx: typer.Context, config_file: Path | None, *, has_cuda: Callable[[], bool] = lambda: False) -> Resolved:
    """The settings of this invocation. `has_cuda` helps to choose a preset, where the command loads a model."""
    return config.resolve(flags=flags(ctx), environ=os.environ, config_file=config_file, has_cuda=has_cuda)


def require_package(package: str) -> None:
    """Raise CountdownError if a package is missing that is only imported later."""
    if find_spec(package) is None:
        raise CountdownError(
            f"the package `{package}` is not installed", "install `countdown-grpo` again, with all it needs"
        )


def require_puzzle(options: Mapping[str, Any]) -> None:
    """Raise CountdownError if `solve` is asked no puzzle, before anything imports torch."""
    parse(" ".join(options["question"]))


def require_models(options: Mapping[str, Any]) -> None:
    """Raise CountdownError if a command names a model that does not exist, before anything imports torch."""
    settings = resolve(options["ctx"], options["config"]).settings
    root, names = Path(settings.runs), list(options.get("models") or [options.get("model")])
    if options.get("resume") is False:
        names = [settings.model.model, settings.model.ref_model]
    for name in names:
        if name not in (None, "same"):
            model_source(root, name)
        if name == "builtin" and (root / name).is_dir():
            show.warning(f"`{name}` is the built-in model, not the folder `{root / name}`")
