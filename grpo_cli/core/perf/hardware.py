"""What a device can do at most: its matrix rate and its memory's bandwidth, from a table or measured.

The table holds what the makers' data sheets state for dense matrices, accumulated in float32 where they tell it apart;
no program reaches it quite. Other devices are measured in a fraction of a second: one large matrix product and one copy
that is larger than the caches. A model that fits in a cache can go below the floor that follows from such a bandwidth.
Knows no model.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from grpo_cli.core.perf.cost import Peak

# NVIDIA's and AMD's data sheets: (pattern of the device's name, dense bfloat16 TFLOP/s, memory GB/s), the first match.
KNOWN: tuple[tuple[str, float, float], ...] = (
    (r"B200", 2250, 8000),
    (r"H200 NVL", 836, 4800),
    (r"H200", 989, 4800),
    (r"H100 NVL", 836, 3900),
    (r"H100 PCIe", 756, 2000),
    (r"H100", 989, 3350),
    (r"A100 80GB PCIe", 312, 1935),
    (r"A100.*80GB", 312, 2039),
    (r"A100", 312, 1555),
    (r"L40S", 362, 864),
    (r"L4$", 121, 300),
    (r"A10G", 70, 600),
    (r"A10$", 125, 600),
    (r"RTX 6000 Ada", 364, 960),
    (r"RTX 5090$", 209.5, 1792),
    (r"RTX 4090$", 165.2, 1008),
    (r"RTX 3090 Ti", 80, 1008),
    (r"RTX 3090$", 71, 936),
    (r"MI300X", 1307, 5300),
)
# These have no bfloat16 matrix units, so that what they do in bfloat16 is measured: T4, V100.
MATRIX, COPY, REPEATS = 1024, 2**27, 8  # rows and columns; bytes, and twice that are moved


@dataclass(frozen=True)
class Hardware:
    """A device's peak rates, and where they are from: `table` or `measured`."""

    name: str
    peak: Peak
    source: str

    def record(self) -> dict[str, object]:
        """For environment.json; in TFLOP/s and GB/s."""
        rates = {"tflops": self.peak.flops / 1e12, "gigabytes_per_second": self.peak.bandwidth / 1e9}
        return {"name": self.name, "source": self.source, **rates}


def known(name: str, dtype: torch.dtype) -> Peak | None:
    """The peaks of a GPU by its device name, or None; rates in float32 are not in the table."""
    if dtype != torch.bfloat16:
        return None
    found = ((rate, bandwidth) for pattern, rate, bandwidth in KNOWN if re.search(rf"\b{pattern}", name))
    return next((Peak(rate * 1e12, bandwidth * 1e9) for rate, bandwidth in found), None)


@cache
def hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    """What a device can do in `dtype`; measured once in a process if the table does not have it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    peak = known(name, dtype) if device.type == "cuda" else None
    return Hardware(name, peak or measure(device, dtype), "table" if peak else "measured")


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of a few matrix products in `dtype` and copies: with the threads that torch uses now."""
    with torch.inference_mode():
        left, right = (torch.ones(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(left)
        source = torch.ones(COPY, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        multiplied = _fastest(lambda: torch.mm(left, right, out=product), device)
        copied = _fastest(lambda: target.copy_(source), device)
    return Peak(2 * MATRIX**3 / multiplied, 2 * COPY / copied)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(REPEATS))
