"""Folders saved atomically, with a manifest that reveals later damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import read_json, sync

_MANIFEST = "manifest.json"
_FORMAT = 4  # checkpoints of other formats are not resumed


@contextmanager
def saving(path: Path, facts: Mapping[str, object] | None = None) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `path` when the block ends without an exception.

    The folder at `path` stays intact on disk at all times, even if the process or the machine stops. With `facts`, the
    folder gets a manifest with them and the size and hash of every file.
    """
    staged, old = _hidden(path, "tmp"), _hidden(path, "old")
    settle(path)
    staged.mkdir(parents=True)
    try:
        yield staged
        if facts is not None:
            manifest = {"format": _FORMAT, **facts, "files": _describe(staged)}
            text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2, allow_nan=False)
            (staged / _MANIFEST).write_text(text + "\n")
        for item in (*staged.rglob("*"), staged):
            sync(item)
        if path.exists():
            path.rename(old)
        staged.rename(path)
        sync(path.parent)
    finally:
        settle(path)


def read_manifest(folder: Path) -> dict[str, object]:
    """The facts that `saving` recorded, and the files; raises CountdownError if they cannot be read."""
    return read_json(folder / _MANIFEST)


def damage(folder: Path, step: int, *, contents: bool = True) -> str | None:
    """How the checkpoint differs from its manifest, or None if it is intact; without `contents`, compare only sizes."""
    try:
        manifest = read_manifest(folder)
    except CountdownError as problem:
        return problem.message
    saved = manifest.pop("sha256", None)
    listed = manifest.get("files")
    if manifest.get("format") != _FORMAT or manifest.get("step") != step or not isinstance(listed, dict):
        return f"`{folder / _MANIFEST}` is not of step {step}, in format {_FORMAT}"
    if saved != _digest(manifest):
        return f"`{folder / _MANIFEST}` is not what was saved"
    present = _describe(folder, contents=contents)
    for name in sorted(listed.keys() | present.keys()):
        actual, expected = present.get(name), listed.get(name)
        if actual is None:
            return f"`{folder / name}` is missing"
        if not isinstance(expected, dict) or not actual.items() <= expected.items():
            return f"`{folder / name}` is not what was saved"
    return None


def discard(path: Path) -> None:
    """Remove a folder, or a link to one; a partly removed folder never keeps its name."""
    old = _hidden(path, "old")
    _remove(old)
    path.rename(old)
    _remove(old)


def settle(path: Path) -> None:
    """Undo an interrupted `saving`, or clean up after a finished one."""
    old = _hidden(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (old, _hidden(path, "tmp")):
        with suppress(OSError):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _describe(folder: Path, *, contents: bool = True) -> dict[str, dict[str, object]]:
    """Size of every file in a folder except the manifest; with `contents` also its SHA-256."""
    described: dict[str, dict[str, object]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            facts: dict[str, object] = {"bytes": path.stat().st_size}
            if contents:
                with path.open("rb") as file:
                    facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            described[path.relative_to(folder).as_posix()] = facts
    return described


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(dict(content), sort_keys=True).encode()).hexdigest()
