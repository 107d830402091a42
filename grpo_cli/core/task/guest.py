"""Call a user's code without letting it change the process that trains.

The code has a working directory, an environment, an import path and random states of its own, which last from call to
call. What else it changes (signal handlers, timers, streams, torch's defaults) is restored after each call.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from grpo_cli.core.errors import CountdownError

Part = tuple[Callable[[], Any], Callable[[Any], object]]  # read and write a part of the process state

SIGNALS = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGALRM,
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGCHLD,
)  # fmt: skip
PACKAGE = Path(__file__).parents[2]
_own: dict[str, Any] = {}  # what the user's code keeps between calls
_inside = False


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
    """Context with the user's own state; printed text goes to stderr, because stdout is data. May be nested."""
    global _inside
    if _inside:
        yield
        return
    _inside = True
    kept, restored = _kept(), _restored()
    host = {name: read() for name, (read, _) in (kept | restored).items()}
    begun = host | {name: _own[name] for name in kept.keys() & _own.keys()}
    for name, (_, write) in kept.items():
        if begun[name] != host[name]:
            write(begun[name])
    stream = host["sys.stderr"] and _Shared(host["sys.stderr"])
    vars(sys).update(stdout=stream, stderr=stream)
    try:
        with _signals():
            yield
    finally:
        _inside = False
        for name, (read, write) in (kept | restored).items():
            now = read()
            if name in kept and now != begun[name]:
                _own[name] = now
            if now != host[name]:
                write(host[name])


class _Shared:
    """A stream that the user's code can write to, but not close."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        self._stream.flush()


def _kept() -> dict[str, Part]:
    """State of which the user's code has its own."""
    kept: dict[str, Part] = {
        "directory": (_directory, _enter),
        "environment": (lambda: dict(os.environ), _set_environment),
        "path": (lambda: list(sys.path), lambda folders: sys.path.__setitem__(slice(None), folders)),
        "random": (random.getstate, random.setstate),
    }
    if numpy := sys.modules.get("numpy"):
        draws = numpy.random
        read: Callable[[], bytes] = lambda: pickle.dumps(draws.get_state(legacy=False))  # noqa: E731
        kept["numpy"] = read, lambda state: draws.set_state(pickle.loads(state))
    if torch := sys.modules.get("torch"):
        kept["torch"] = (lambda: bytes(torch.get_rng_state().numpy())), _set_torch
    return kept


def _restored() -> dict[str, Part]:
    """State that is restored after each call."""
    restored: dict[str, Part] = {
        "mask": (lambda: os.umask(os.umask(0o077)), os.umask),
        "recursion": (sys.getrecursionlimit, sys.setrecursionlimit),
        **{f"sys.{name}": _attribute(sys, name) for name in ("stdin", "stdout", "stderr", "argv", "excepthook")},
    }
    if torch := sys.modules.get("torch"):
        restored["gradients"] = torch.is_grad_enabled, torch.set_grad_enabled
        restored["dtype"] = torch.get_default_dtype, torch.set_default_dtype
        restored["device"] = torch.get_default_device, lambda _: torch.set_default_device(None)
        restored["threads"] = torch.get_num_threads, torch.set_num_threads
    return restored


def _attribute(owner: object, name: str) -> Part:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


def _directory() -> str:
    """The working directory; empty if it was removed."""
    with suppress(FileNotFoundError):
        return os.getcwd()
    return ""


def _enter(directory: str) -> None:
    with suppress(FileNotFoundError):
        os.chdir(directory)


def _set_torch(state: bytes) -> None:
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _set_environment(values: Mapping[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in values.items() if os.environ.get(name) != value})


@contextmanager
def _signals() -> Iterator[None]:
    """Restore signal handlers and cancel a timer afterwards.

    A handler of ours that ran in between may have replaced itself: that stays. In a child process that the user's code
    forks, such as a pool's worker, signals have their default effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, arrived = os.getpid(), set[int]()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def watch(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        arrived.add(number)
        handlers[number](number, frame)

    handlers: dict[int, Callable[..., object]] = {}
    for number, handler in before.items():
        if callable(handler):
            handlers[number] = handler
            signal.signal(number, watch)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            now = signal.getsignal(number)
            if now is not handler and handler is not None and (now is watch or number not in arrived):
                signal.signal(number, handler)
