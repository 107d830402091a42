"""Micro-batch size: halved each time memory runs out or, on a CPU, exceeds a limit.

The kernel kills a process that uses too much memory, so there is no exception to catch on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch

from grpo_cli.core.errors import CountdownError

# torch's messages for cases without an exception class.
SENTENCES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class NearLimit(MemoryError):
    """The process exceeds its memory limit."""


class MicroBatch:
    """Micro-batch size, 0 for all rows; halved permanently when memory runs out, or exceeds `limit` bytes if not 0.

    `logit_chunk`: the tokens whose logits are computed at once, 0 for all.
    """

    def __init__(
        self, rows: int = 0, *, limit: int = 0, logit_chunk: int = 0, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self.rows, self.limit, self.logit_chunk = rows, limit, logit_chunk
        self._report = report

    def unlimited(self) -> MicroBatch:
        """One for other passes: all rows at first, and the same memory limit."""
        return MicroBatch(limit=self.limit, report=self._report)

    def attempts(self, total: int, doing: str) -> Iterator[AbstractContextManager[None]]:
        """Contexts for passes over `total` rows, one after the other until one does not run out of memory.

            for attempt in micro_batch.attempts(len(rows), "update"):
                with attempt:
                    ...  # passes of `micro_batch.rows` rows; must not have a lasting effect if it fails

        Each failure halves `rows`. Raises CountdownError if one row does not fit.
        """
        failures: list[str] = []
        yield _attempt(failures)
        while failures:
            self._halve(total, doing, failures.pop())
            yield _attempt(failures)

    def split(self, rows: Iterable[int]) -> list[list[int]]:
        """Cut rows into micro-batches."""
        rows = list(rows)
        size = self.rows or max(1, len(rows))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def check(self) -> None:
        """Raise NearLimit if the process exceeds the limit even after returning freed memory."""
        if self.limit and resident() > self.limit:
            give_back()
            if resident() > self.limit:
                raise NearLimit

    @contextmanager
    def watched(self, rows: int) -> Iterator[None]:
        """Context of a pass, with its backward, over `rows` completions.

        Raises NearLimit after a pass that raised the peak memory of the process above the limit; a single completion
        may.
        """
        if self.limit and resident() > self.limit // 2:
            give_back()
        before = process_peak()
        yield
        if self.limit and rows > 1 and process_peak() > max(before, self.limit):
            raise NearLimit

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


@contextmanager
def _attempt(failures: list[str]) -> Iterator[None]:
    """Context that adds to `failures` how memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        failures.append("is nearly full" if isinstance(error, NearLimit) else "ran out")


def ran_out(error: Exception) -> bool:
    """Whether an exception means out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in SENTENCES)


def resident() -> int:
    """Bytes of physical memory of this process; 0 if the system does not report them."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
