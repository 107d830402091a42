"""Checks of a model's name and of a GGUF file's first bytes, without torch."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import can_read
from grpo_cli.core.model.folder_checks import check_folder, refuse_adapter

MAGIC = b"GGUF"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def require_model(name: str, *, suggestion: str | None = None) -> None:
    """Raise CountdownError unless `name` is builtin, a model folder, a GGUF file, or looks like a hub id.

    A mistyped folder is refused, so it is not looked up on a hub.
    """
    if name == "builtin":
        return
    if is_gguf(name):
        require_gguf(Path(name))
    elif os.path.isdir(name):
        if not os.path.isfile(Path(name) / "config.json"):
            refuse_adapter(name, os.listdir(name))
            inner = Path(name) / "model"  # a checkpoint's
            hint = f"name `{inner}`" if inner.is_dir() else "name a folder with config.json and weights, or a run"
            raise CountdownError(f"`{name}` is not a model folder: it has no config.json", hint)
        check_folder(name, Path(name))
    elif not HUB_ID.fullmatch(name) or os.path.exists(Path(name).parent):
        hint = "use `builtin`, a run's name, a model folder, a GGUF file, or a hub id `owner/name`"
        raise CountdownError(f"no model at `{name}`", suggestion or hint)


def is_gguf(name: str) -> bool:
    """Whether a model's name is a GGUF file rather than a folder or a hub id."""
    return name.lower().endswith(".gguf")


def require_gguf(path: Path) -> None:
    """Raise CountdownError unless `path` is a GGUF file, and what reads it is installed."""
    if path.is_dir():
        raise CountdownError(f"`{path}` is a folder, not a GGUF file", "name the file in it, or rename a model folder")
    if not path.is_file():
        raise CountdownError(f"no file `{path}`", "name a GGUF file, a model folder or a hub id")
    if not can_read(path):
        raise CountdownError(f"`{path}` cannot be read", "change its permissions")
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise CountdownError(f"`{path}` is not a GGUF file: it does not start with `GGUF`", "download it again")
    if not (find_spec("gguf") and find_spec("accelerate")):
        raise CountdownError("reading GGUF files needs the extra `gguf`", "pip install 'countdown-grpo[gguf]'")
