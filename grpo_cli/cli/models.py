"""The models that commands run: their settings, how they are loaded, and how many completions are decoded at once."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from grpo_cli.cli.launch import process_info
from grpo_cli.cli.options import flags, require_engine, resolve
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.microbatch import MicroBatch
    from grpo_cli.core.model.policy import Policy
    from grpo_cli.core.run.folder import Run


RUNNING = ("model.device", "model.precision", "model.threads", "model.rollout", "model.vllm_url", "model.vllm_folder")


@dataclass(frozen=True)
class ModelChoice:
    """A model's name, the folder or hub id to load it from, and its settings."""

    name: str
    source: str
    settings: Settings


def choose(ctx: typer.Context, config_file: Path | None, names: list[str] | None) -> list[ModelChoice]:
    """Each model with its settings; without names the newest run, else builtin.

    A run, and each model in its folder, has the run's settings, other models those of the invocation. Raises
    CountdownError if there is no such model.
    """
    from grpo_cli.core.config.resolve import restore
    from grpo_cli.core.run.folder import Run, find_run, run_of
    from grpo_cli.core.run.models import model_source

    asked = resolve(ctx, config_file).settings
    root, given = Path(asked.runs), flags(ctx)
    if not names:
        newest = Run.newest(root)
        names = [newest.name if newest is not None else "builtin"]
    chosen = []
    for name in names:
        source = model_source(root, name)
        settings, run = asked, find_run(root, name) or run_of(Path(source))
        if run is not None:
            kept = {key: value for key, value in given.items() if key not in ("preset", "runs")}
            settings = restore(run.read_config(), run.config_path, flags=kept).settings
            warn_of_bug(run)
        elif name == "builtin" and "preset" not in given and asked.preset != "builtin":
            settings = resolve(ctx, config_file, {"preset": "builtin"}).settings
        warn_of_folder(root, name)
        chosen.append(ModelChoice(name, source, settings))
    return chosen


def warn_of_bug(run: Run) -> None:
    """Warn if a run was trained with `--break`."""
    if (bug := run.settings.train.broken) != "none":
        show.warning(f"`{run.name}` was trained with a bug planted on purpose: `--break {bug}`")


def warn_of_folder(root: Path, name: str) -> None:
    """Warn if a folder has the name of the built-in model."""
    if name == "builtin" and os.path.isdir(root / name):
        show.warning(f"`{name}` is the built-in model, not the folder `{root / name}`")


def import_libraries() -> None:
    """Import torch and transformers with garbage collection paused, which takes a third of the time."""
    gc.disable()
    try:
        import_module("grpo_cli.core.rollout.selfcheck")
    finally:
        gc.enable()


def load(chosen: ModelChoice) -> Policy:
    """Load a model for sampling."""
    require_engine(chosen.settings)
    import_libraries()
    from grpo_cli.core.model.load import set_threads
    from grpo_cli.core.rollout.selfcheck import load_checked

    model = chosen.settings.model
    set_threads(model.threads)
    return load_checked(chosen.source, name=chosen.name, device=model.device, precision=model.precision, note=show.note)


def micro_batch_of(settings: Settings, rows: int = 0) -> MicroBatch:
    """At most `rows` completions at once, 0 for all; fewer if memory runs out, on a CPU before it does."""
    from grpo_cli.core.microbatch import MicroBatch
    from grpo_cli.core.model.load import detect_device
    from grpo_cli.core.perf import memory

    on_cpu = detect_device(settings.model.device).type == "cpu"
    limit = memory.host_limit(ranks=process_info().size) if on_cpu else 0
    return MicroBatch(rows, limit=limit, report=show.note)
