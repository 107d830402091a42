"""Checks of a model's name, without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.folder_checks import check_folder, refuse_adapter

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def require_model(name: str, *, suggestion: str | None = None) -> None:
    """Raise CountdownError unless `name` is builtin, a model folder, a GGUF file, or looks like a hub id.

    A mistyped folder is refused, so it is not looked up on a hub.
    """
    if name == "builtin" or name.lower().endswith(".gguf"):
        return
    if os.path.isdir(name):
        if not os.path.isfile(Path(name) / "config.json"):
            refuse_adapter(name, os.listdir(name))
            raise CountdownError(f"`{name}` is not a model folder: it has no config.json", "name the folder itself")
        check_folder(name, Path(name))
    elif not HUB_ID.fullmatch(name) or os.path.exists(Path(name).parent):
        hint = "use `builtin`, a run's name, a model folder, a GGUF file, or a hub id `owner/name`"
        raise CountdownError(f"no model at `{name}`", suggestion or hint)
