"""Whole groups of a run, in a file of gzip members: one per step, so a write that is cut off loses one step at most.

A line is a group: its step and problem, and all its completions with rewards and advantages.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_cli.core.files import append_bytes, require_regular
from grpo_cli.core.run.logs import cut

_MAGIC = b"\x1f\x8b\x08"  # the first bytes of a gzip member


@dataclass(frozen=True)
class GroupLog:
    """The file, which need not exist."""

    path: Path

    def append(self, groups: Sequence[Mapping[str, object]]) -> None:
        """Append the groups of one step."""
        if groups:
            text = "".join(f"{json.dumps(dict(group), allow_nan=False)}\n" for group in groups)
            append_bytes(self.path, gzip.compress(text.encode(), mtime=0))

    def read(self, step: int | None = None) -> Iterator[dict[str, Any]]:
        """The groups of every step, or of one; those of damaged members are left out."""
        for number, _, text in self._members():
            if number is not None and step in (None, number):
                yield from map(json.loads, text.splitlines())

    def cut(self, last: int) -> int:
        """Keep the steps up to `last`, move damaged members to `<log>.damaged`, and return their number: lost steps."""
        return cut(self.path, [(step, raw) for step, raw, _ in self._members()], last)

    def _members(self) -> Iterator[tuple[int | None, bytes, bytes]]:
        """(step, compressed, text) of every member but a last one cut off; the step is None if it is damaged."""
        if not self.path.exists():
            return
        require_regular(self.path)
        left = self.path.read_bytes()
        while left:
            text, size = _unpacked(left)
            step = None if text is None else _step(text)
            if step is None:  # continue at the next member
                size = left.find(_MAGIC, 1)
                if size < 0:
                    return
            yield step, left[:size], text or b""
            left = left[size:]


def _unpacked(data: bytes) -> tuple[bytes | None, int]:
    """The text of the member at the start of `data`, None if it is damaged or cut off, and its compressed size."""
    member = zlib.decompressobj(wbits=31)  # gzip, with its checksum
    try:
        text = member.decompress(data)
    except zlib.error:
        return None, 0
    return (text, len(data) - len(member.unused_data)) if member.eof else (None, 0)


def _step(text: bytes) -> int | None:
    """The step of the first line, if all lines are objects of groups."""
    try:
        steps = {group["step"] for group in map(json.loads, text.splitlines()) if group["completions"]}
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return steps.pop() if len(steps) == 1 else None
