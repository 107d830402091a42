"""What the benchmarks share: timing, peak memory, tables, and a JSON file with the facts of the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Seconds = dict[str, float]


@contextmanager
def timed(seconds: Seconds, phase: str) -> Iterator[None]:
    """Add what passes here to a phase, work that is queued on a GPU included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory in use so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path | None, results: Any) -> None:
    """Results as JSON beside what they depend on; the load tells a quiet machine from a busy one."""
    if path is None:
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu}
    facts = {**machine, "torch": torch.__version__, "load": os.getloadavg()}
    path.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
