"""Text for terminals: untrusted text made printable, numbers, and messages."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from grpo_cli.core.errors import CountdownError

EXCERPT_CHARACTERS = 4_000

out = Console(markup=False, emoji=False, highlight=False)


err = Console(markup=False, emoji=False, highlight=False, stderr=True)


LEVELS = "▁▂▃▄▅▆▇█"


INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


def prepare_streams() -> None:
    """Escape characters that stdout's encoding lacks, as stderr does, and open closed streams on the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the end)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def can_redraw(console: Console) -> bool:
    """Whether a console is a terminal that can redraw in place."""
    return console.is_interactive and console.file.isatty()


def printable(text: str, *, keep_newlines: bool = False, limit: int | None = None) -> str:
    """Text that cannot act on a terminal: invisible characters appear as codes, such as `\\x1b` or `\\u202e`.

    That is C0, C1, DEL, bidirectional and zero-width characters, lone surrogates and unusual spaces. Beyond `limit`
    characters, the middle is replaced by its length.
    """
    if limit is not None and len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[len(text) - half :]}"
    return "".join(
        character
        if (character.isprintable() and character not in INVISIBLE) or (keep_newlines and character == "\n")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def excerpt(text: str, *, width: int, lines: int) -> Text:
    """The beginning and end of a completion in at most `lines` lines of `width` cells."""
    shown = Text(printable(text.strip("\n"), keep_newlines=True, limit=EXCERPT_CHARACTERS))
    wrapped = list(shown.wrap(err, width, overflow="fold"))
    for line in wrapped:
        line.rstrip()
    if len(wrapped) > lines:
        head = max(lines // 3, 1)
        tail = max(lines - head - 1, 0)
        wrapped = [*wrapped[:head], Text("…", style="dim"), *wrapped[len(wrapped) - tail :]][:lines]
    return Text("\n").join(wrapped)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as at most `width` blocks from lowest to highest; surplus values are averaged."""
    finite = [value for value in values if math.isfinite(value)]
    size = min(width, len(finite))
    if size < 1:
        return ""
    edges = [index * len(finite) // size for index in range(size + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(LEVELS) - 1
    return "".join(LEVELS[round((mean - low) / span * top)] if span else LEVELS[top // 2] for mean in means)


def percent(share: float) -> str:
    """A share as `41.6%`."""
    return f"{share:.1%}"


def accuracy(share: float, bounds: tuple[float, float]) -> str:
    """A share with its interval as `41.6% (36.3 to 47.0%)`."""
    return f"{percent(share)} ({interval(bounds)})"


def interval(bounds: tuple[float, float]) -> str:
    """Two shares as `36.3 to 47.0%`."""
    return f"{100 * bounds[0]:.1f} to {percent(bounds[1])}"


def thousandths(value: float) -> str:
    """The value with three decimals, never `-0.000`."""
    return f"{round(value, 3) + 0.0:.3f}"


def counted(count: int, noun: str) -> str:
    """A count with its noun as `1 cell` or `2,000 cells`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def question(numbers: Iterable[int], target: int) -> str:
    """A puzzle as `[4, 7, 3] -> 25`."""
    return f"{list(numbers)} -> {target}"


def silence(quiet: bool = True) -> None:
    """Turn output off, or on again."""
    out.quiet = err.quiet = quiet


def note(text: str) -> None:
    """Print one informational line on stderr."""
    err.print(Text(printable(text, keep_newlines=True)), soft_wrap=True)


def warning(text: str) -> None:
    """Print one warning line on stderr."""
    headed("warning", "bold yellow", text)


def error(problem: CountdownError) -> None:
    """Print an error on stderr: what and where, then the hint."""
    headed("error", "bold red", problem.message)
    if problem.hint:
        err.print()
        headed("hint", "bold cyan", problem.hint)


def headed(word: str, style: str, text: str) -> None:
    err.print(Text.assemble((word, style), (":", "bold"), " ", printable(text, keep_newlines=True)), soft_wrap=True)


def json_object(value: object) -> None:
    """Print one line of ASCII JSON on stdout, so completions cannot affect a terminal."""
    out.file.write(json.dumps(value) + "\n")


def probability(value: float) -> str:
    """A p-value in a sentence as `= 0.031` or `< 0.001`."""
    return f"= {p_value(value)}" if value >= 0.001 else p_value(value)


def p_value(value: float) -> str:
    """A p-value in a table as `0.031` or `< 0.001`."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
