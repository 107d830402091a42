"""Call a user's code, and restore what it changes in the process that trains.

Restored are streams, the working directory, signal handlers, a timer, limits of the process and torch's defaults. A
training draws nothing from the global random generators, so a user's code may seed and use them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from grpo_cli.core.errors import CountdownError

Part = tuple[Callable[[], Any], Callable[[Any], object]]  # read and write a part of the process state

SIGNALS = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGALRM,
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGCHLD,
)  # fmt: skip
PACKAGE = Path(__file__).parents[2]
LIMITS: list[Part] = [
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (lambda: os.umask(os.umask(0o077)), os.umask),
]


def call(function: Callable[..., Any], what: str, *arguments: object) -> Any:
    """Call a user's function; an exception becomes a CountdownError with file, line and arguments."""
    try:
        with apart():
            return function(*arguments)
    except BaseException as error:
        if isinstance(error, CountdownError) or interrupts(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        shown = ", ".join(repr(argument)[:200] for argument in arguments)
        raise CountdownError(
            f"{what} failed in `{place.filename}`, line {place.lineno}: {type(error).__name__}: {error}",
            f"it was called with {shown}",
        ) from error


def interrupts(error: BaseException) -> bool:
    """Whether this is Ctrl-C rather than the user's own `sys.exit`."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(place.filename).is_relative_to(PACKAGE)
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and own)


@contextmanager
def apart() -> Iterator[None]:
    """Context that restores the state of the process; printed text goes to stderr, because stdout is data."""
    in_main, parts = threading.current_thread() is threading.main_thread(), [*LIMITS, *_torch_defaults()]
    if in_main:
        parts += [(partial(signal.getsignal, number), partial(signal.signal, number)) for number in SIGNALS]
    before, stream = [read() for read, _ in parts], sys.stderr and _Shared(sys.stderr)
    try:
        with chdir("."), redirect_stdout(stream), redirect_stderr(stream):
            yield
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for (read, write), value in zip(parts, before, strict=True):
            if read() != value:
                write(value)


class _Shared:
    """A stream that the user's code can write to, but not close."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        self._stream.flush()


def _torch_defaults() -> list[Part]:
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    return [
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, lambda _: torch.set_default_device(None)),
        (torch.get_num_threads, torch.set_num_threads),
    ]
