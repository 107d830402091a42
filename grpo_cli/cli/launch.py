"""The process of a command: its rank under torchrun or SLURM, and the signals that stop or save a training."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.rl.observer import Control, Interrupted
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.world import World


@dataclass(frozen=True)
class ProcessInfo:
    """The rank of this process among `size`, and its `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0  # restarts by the launcher
    max_restarts: int = 0


# Variables for rank, size and local rank, by launcher.
_NAMES = [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")]


def process_info(environ: Mapping[str, str] = os.environ) -> ProcessInfo:
    """This process's rank; rank 0 of 1 without a launcher.

    A SLURM job counts as a launcher if MASTER_ADDR and MASTER_PORT are set.
    """
    names = next((names for names in _NAMES if all(name in environ for name in names)), None)
    if names is None or "MASTER_ADDR" not in environ:
        return ProcessInfo()
    variables = [*names, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"]
    values = [environ.get(name, "0") for name in variables]
    bad = [f"{name}={text}" for name, text in zip(variables, values, strict=True) if not text.isdecimal()]
    if bad:
        raise CountdownError(f"the launcher's environment is not one of whole numbers: {', '.join(bad)}")
    rank, size, *rest = map(int, values)
    if rank >= size:
        raise CountdownError(f"the launcher's environment has a rank {rank} among {size} processes")
    return ProcessInfo(rank, size, *rest)


@contextmanager
def joined(settings: Settings) -> Iterator[World]:
    """The world of the processes that a launcher started, one GPU each; of one process without a launcher.

    An error names its rank, and is shown by the first rank to fail; the others end in silence.
    """
    from grpo_cli.core.world import World

    process = process_info()
    if process.size == 1:
        yield World()
        return
    world = _join(process, settings)
    try:
        yield world
    except Interrupted:
        raise
    except Exception as error:  # of any kind: it must not be lost among the launcher's own
        show.silence(not world.fails_first())
        sentence = error.message if isinstance(error, CountdownError) else " ".join(str(error).split())
        hint = getattr(error, "hint", "the last checkpoint is intact: continue with `--resume`")
        code = getattr(error, "exit_code", 1)
        name = f"rank {world.rank} of {world.size}"
        raise CountdownError(f"{name}: {sentence or type(error).__name__}", hint, exit_code=code) from error
    world.leave()


def _join(process: ProcessInfo, settings: Settings) -> World:
    import torch

    from grpo_cli.core.model.load import detect_device
    from grpo_cli.core.world import join

    device = detect_device(settings.model.device)
    if device.type == "cuda":
        devices = torch.cuda.device_count()
        if process.local_rank >= devices:
            raise CountdownError(
                f"process {process.local_rank} of this machine has no GPU of its own: there are {devices}",
                "start one process per GPU with `--nproc-per-node`",
            )
        torch.cuda.set_device(process.local_rank)
    return join(process.rank, process.size, device=device, timeout=settings.ranks.timeout, attempt=process.restarts)


@contextmanager
def ignoring_requests() -> Iterator[None]:
    """Context in which SIGUSR1, a request to save, does not end the process; `Signals` answers it within."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class Signals(Control):
    """Context in which signals ask a training to stop or save instead of ending the process.

    SIGINT, SIGTERM, SIGHUP and a closed stderr stop it; SIGUSR1 saves. A second SIGINT or SIGTERM ends the process,
    except under a launcher (`launched`), which may forward a signal twice. Under nohup, SIGHUP stays ignored.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self._launched = launched
        self.stop: int | None = None
        self._save = self._announced = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._stderr = sys.stderr
        self._process = os.getpid()

    def __enter__(self) -> Self:
        stopping = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            stopping.append(signal.SIGHUP)
        handlers = {**dict.fromkeys(stopping, self._request_stop), signal.SIGUSR1: self._request_save}
        self._handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        os.register_at_fork(after_in_child=self._leave_to_parent)
        self._stderr, sys.stderr = sys.stderr, cast("TextIO", _Tolerant(sys.stderr, self._lost_reader))
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr = self._stderr
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _leave_to_parent(self) -> None:
        """In a child that a user's code forks: a handler in Python would not run while the child waits for a lock."""
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else signal.SIG_DFL)

    def _request_stop(self, number: int, _: FrameType | None) -> None:
        is_second = self.stop is not None and not self._launched
        if is_second or os.getpid() != self._process:  # or in a child that was forked this instant
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = self.stop or number
        for stopping in () if self._launched else (signal.SIGINT, signal.SIGTERM):
            signal.signal(stopping, signal.SIG_DFL)
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # show the cursor, which the live view hides

    def _request_save(self, _: int, __: FrameType | None) -> None:
        self._save = True

    def _lost_reader(self) -> None:
        self.stop = self.stop or signal.SIGPIPE

    def should_stop(self) -> bool:
        if self.stop is not None and not self._announced:
            self._announced = True
            show.note("stopping after saving the last completed step; press Ctrl-C again to leave at once")
        return self.stop is not None

    def should_save(self) -> bool:
        requested, self._save = self._save, False
        return requested


class _Tolerant:
    """A text stream that reports failed writes (closed pipe or terminal) to `lost` instead of raising."""

    def __init__(self, stream: TextIO, lost: Callable[[], None]) -> None:
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._attempt(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], int | None]) -> int:
        try:
            return action() or 0
        except OSError:
            self._lost()
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # discard buffered output
            return 0
