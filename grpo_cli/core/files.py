"""Atomic file writes, and JSON Lines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from grpo_cli.core.errors import CountdownError


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raise CountdownError if `write` would fail, or would replace a file without `overwrite`.

    Writing to devices and FIFOs replaces nothing, so they need no `overwrite`.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise CountdownError(f"`{path.parent}` is not a folder", "write elsewhere") from None
    except (OSError, ValueError) as error:
        raise CountdownError(f"cannot write `{path}`: {getattr(error, 'strerror', error)}", "write elsewhere") from None
    if not path.parent.is_dir():
        raise CountdownError(f"`{path.parent}` is not a folder", "create it, or write elsewhere")
    if path.is_dir():
        raise CountdownError(f"`{path}` is a folder", "name a file in it")
    if (path.is_file() or (path.is_symlink() and not path.exists())) and not overwrite:
        raise CountdownError(f"`{path}` exists", "write elsewhere, or replace it with `--overwrite`")
    needed = [path] if _in_place(path) else [path.parent, path]
    if not all(can_write(place) for place in needed if place.exists()):
        raise CountdownError(f"`{path}` cannot be written", "write elsewhere, or change its permissions")


def require_ending(path: Path, *endings: str) -> None:
    """Raise CountdownError if a file's name ends as one of another format does; it may have no ending."""
    if path.suffix.lower() not in ("", *endings):
        *others, last = [f"`{ending}`" for ending in endings]
        hint = f"end its name in {', '.join(others)} or {last}" if others else f"end its name in {last}"
        raise CountdownError(f"`{path}` would not be a file of the format that its name says", hint)


def can_write(path: Path) -> bool:
    """Whether this process may write to an existing file or folder."""
    return _may(path, os.W_OK)


def can_read(path: Path) -> bool:
    """Whether this process may read an existing file or folder."""
    return _may(path, os.R_OK)


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def write(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the old or the new content, even after a crash.

    Devices, FIFOs and symbolic links are written through, never replaced. Raises CountdownError, exit code 1.
    """
    temporary = path.with_name(f".countdown.{os.getpid()}.tmp")
    try:
        if _in_place(path):
            path.write_bytes(content)
            return
        temporary.write_bytes(content)
        if path.exists():
            shutil.copymode(path, temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise CountdownError(f"cannot write `{path}`: {error.strerror}", exit_code=1) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write lines as `write` does; if they do not fit, keep the first ones in `<path>.part`."""
    content = "".join(f"{line}\n" for line in lines).encode()
    try:
        write(path, content)
    except CountdownError as problem:
        part, kept = path.with_name(f"{path.name}.part"), 0
        if not _in_place(path):
            with suppress(OSError):
                kept = _fill(part, content)
        hint = f"the first {kept:,} of {len(lines):,} lines are in `{part}`" if kept else None
        raise CountdownError(problem.message, hint, exit_code=1) from None


def _fill(path: Path, content: bytes) -> int:
    """Write as many whole lines as fit; returns their number."""
    with path.open("wb", buffering=0) as file:
        written = 0
        with suppress(OSError):
            while written < len(content):
                written += file.write(content[written:])
        whole = content.rfind(b"\n", 0, written) + 1
        file.truncate(whole)
        return content.count(b"\n", 0, whole)


def _in_place(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file())


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write an object of finite numbers as `write` does."""
    write(path, json.dumps(dict(content), indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; raises CountdownError if it has none."""
    try:
        require_regular(path)
        return json_object(path.read_bytes())
    except OSError as error:
        raise CountdownError(f"cannot read `{path}`: {error.strerror}") from None
    except ValueError as problem:
        raise CountdownError(f"`{path}` {problem}") from None


def json_object(text: bytes) -> dict[str, object]:
    """The object in JSON text; raises ValueError if it has none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    return content


def append_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Append one line per record."""
    append_bytes(path, "".join(f"{json.dumps(dict(record), allow_nan=False)}\n" for record in records).encode())


def append_bytes(path: Path, content: bytes) -> None:
    """Append to a file, which need not exist."""
    with path.open("ab") as file:
        file.write(content)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a JSON Lines file, except a last one that was cut off; none if the file does not exist."""
    if not os.path.lexists(path):
        return
    require_regular(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                try:
                    json_object(raw)
                except ValueError:
                    return
            yield number, raw.rstrip() + b"\n"


def require_regular(path: Path) -> None:
    """Refuse devices, FIFOs and folders; a missing file is left to the reader."""
    if path.exists() and not path.is_file():
        raise CountdownError(f"`{path}` is not a regular file")
