"""Export a run's best model to a folder: weights, tokenizer and card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import read_json
from grpo_cli.core.run import checkpoint
from grpo_cli.core.run.folder import list_runs, require_outside_runs

CARD = "README.md"
CONFIGS = ("config.json", "adapter_config.json")
_LICENSE = re.compile(r"^license: *([A-Za-z0-9.+-]+) *$", re.MULTILINE)


def check_destination(folder: Path, *, overwrite: bool) -> None:
    """Raise CountdownError unless `folder` is free, or an earlier export that `overwrite` may replace.

    A folder in a run, or beside one, is refused: beside runs, a model is taken for one of them.
    """
    require_outside_runs(folder)
    if folder.suffix in (".gguf", ".safetensors"):
        raise CountdownError(
            f"`{folder}` names a file, and an export is a folder",
            "leave out the ending; `--gguf q8_0` adds a GGUF file",
        )
    parent = Path(os.path.realpath(folder)).parent
    if any(os.path.isfile(run.path / "origin.json") for run in list_runs(parent)):
        raise CountdownError(f"`{folder}` would be taken for a run", f"choose a folder outside `{folder.parent}`")
    if not folder.absolute().parent.is_dir():
        raise CountdownError(f"`{folder.parent}` is not a folder", "create it, or choose another folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CountdownError(f"`{folder}` is not a folder", "choose another name")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / CARD).is_file() or not any((folder / name).is_file() for name in CONFIGS):
        raise CountdownError(f"`{folder}` holds other files than an export", "choose another folder")
    if not overwrite:
        raise CountdownError(f"`{folder}` exists", "choose another folder, or replace it with `--overwrite`")


@contextmanager
def exporting(model: Path, folder: Path, card: str) -> Iterator[Path]:
    """Yield a copy of a run's model or adapter with its card, to complete; it replaces `folder` when the block ends."""
    if not any(model.glob("*.safetensors")):
        raise CountdownError(f"`{model}` has no weights", "export another run")
    with checkpoint.saving(folder) as staged:
        try:
            shutil.copytree(model, staged, dirs_exist_ok=True)
        except shutil.Error as error:
            file, _, reason = error.args[0][0]
            hint = "make room, or change its permissions"
            raise CountdownError(f"cannot copy `{file}`: {reason}", hint, exit_code=1) from error
        (staged / CARD).write_text(card, encoding="utf-8")
        yield staged


def limit_completions(folder: Path, max_new_tokens: int) -> None:
    """Set the length up to which a model generates by default; transformers' own is 20 tokens."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**read_json(path), "max_new_tokens": max_new_tokens}, indent=2) + "\n", "utf-8")


def license_of(model: str) -> str | None:
    """The license in a model's own card, or None; the built-in model has this package's."""
    if model == "builtin":
        return "apache-2.0"
    card = Path(model) / CARD
    match = _LICENSE.search(card.read_text(encoding="utf-8", errors="replace")[:4096]) if card.is_file() else None
    return match[1] if match else None
