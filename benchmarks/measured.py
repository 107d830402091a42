"""Shared by the benchmarks: timing, peak memory, tables, and a JSON file with the machine's data."""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Seconds = dict[str, float]


@contextmanager
def timed(seconds: Seconds, phase: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Add the block's time to a phase, including work queued on a GPU."""
    start = clock()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + clock() - start


def peak_bytes() -> int:
    """Peak memory so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path | None, results: Any) -> None:
    """Write results as JSON with the machine's data; the load shows whether it was idle."""
    if path is None:
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu}
    facts = {**machine, "torch": torch.__version__, "load": os.getloadavg()}
    path.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
