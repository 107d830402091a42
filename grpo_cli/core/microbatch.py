"""Micro-batch size: halved each time memory runs out, or is about to.

On a CPU, the kernel kills a process that uses too much memory, so resident memory is watched there.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import torch

from grpo_cli.core.errors import CountdownError

T = TypeVar("T")
# torch's messages for cases without an exception class.
SENTENCES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_PROCESS = Path("/proc/self")


class NearLimit(MemoryError):
    """The process is about to exceed its memory limit."""


class MicroBatch:
    """Micro-batch size, 0 for all rows; halved permanently when memory runs out, or nears `limit` bytes if not 0.

    `logit_chunk`: the tokens whose logits are computed at once, 0 for all.
    """

    def __init__(
        self, rows: int = 0, *, limit: int = 0, logit_chunk: int = 0, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self.rows, self.limit, self.logit_chunk = rows, limit, logit_chunk
        self._report = report
        self._largest = (1, 0)  # tokens of the pass that took most memory, and its bytes
        self._measured: tuple[int, int] | None = None  # tokens of the current pass, and bytes that stay after it

    def whole(self) -> MicroBatch:
        """One for other passes, which starts with all rows, with the same limit."""
        return MicroBatch(limit=self.limit, report=self._report)

    def attempt(self, work: Callable[[int], T], *, total: int, doing: str) -> T:
        """Call `work` with the micro-batch size for `total` rows; if memory runs out, repeat it with half the size.

        A failed attempt must have no lasting effect. Raises CountdownError if one row does not fit.
        """
        while True:
            try:
                return work(self.rows)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                why = "is nearly full" if isinstance(error, NearLimit) else "ran out"
            self._halve(total, doing, why)

    def check(self) -> None:
        """Raise NearLimit if the process exceeds the limit even after returning freed memory."""
        if self.limit and resident() > self.limit:
            give_back()
            if resident() > self.limit:
                raise NearLimit

    def begin(self, *, tokens: int, rows: int, adds: int = 0) -> None:
        """Before a pass over `tokens` of `rows` completions: raise NearLimit if its predicted peak exceeds the limit.

        The prediction scales the largest pass so far. `adds`: bytes that stay after the pass, such as new gradients. A
        single completion is always tried.
        """
        if not self.limit:
            return
        if resident() > self.limit // 2:
            give_back()
        stays, (most_tokens, most) = resident() + adds, self._largest
        if rows > 1 and stays + most * tokens / most_tokens > self.limit:
            raise NearLimit
        self._measured = (tokens, stays) if _reset_peak() else None

    def end(self) -> None:
        """After the pass, including its backward: record the memory that it took."""
        if self._measured is not None:
            tokens, stays = self._measured
            self._largest, self._measured = max(self._largest, (tokens, _peak() - stays), key=itemgetter(1)), None

    def _halve(self, total: int, doing: str, why: str) -> None:
        largest = min(self.rows or total, total)
        if largest <= 1:
            raise CountdownError(
                f"memory {why} in the {doing} of a single completion",
                "set a smaller `--max-new-tokens`, set `--gradient-checkpointing on`, or use a smaller model",
                exit_code=1,
            )
        self.rows = (largest + 1) // 2
        give_back()
        completions = "1 completion" if self.rows == 1 else f"{self.rows} completions"
        self._report(f"memory {why} in the {doing}: repeating it with {completions} at once")


def ran_out(error: Exception) -> bool:
    """Whether an exception means out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in SENTENCES)


def resident() -> int:
    """Bytes of physical memory of this process; 0 if the system does not report them."""
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Return freed memory to the system; the C library and CUDA's allocator keep it otherwise."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # not available in every C library
            ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def process_peak() -> int:
    """Peak bytes of physical memory of this process so far; 0 on Windows, which does not report it."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return max(_Peaks.before_reset, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class _Peaks:
    before_reset = 0  # the largest that `_reset_peak` has cleared


def _peak() -> int:
    """Peak bytes of physical memory of this process since `_reset_peak`."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _reset_peak() -> bool:
    """Reset the peak of resident memory; False if that is not possible."""
    peak = process_peak()
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    _Peaks.before_reset = peak
    return True
