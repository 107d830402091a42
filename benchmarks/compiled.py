"""Compile every Triton kernel for GPUs that are not here, through the package's own launch code.

    python benchmarks/compiled.py --capability 90 120

A driver names the target, and launching only compiles: constants, alignment and warps are those of a real launch. The
table shows registers, spilled bytes and shared memory, beside the most that a block may use on that GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from measured import table, write
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from grpo_cli.core.model import kernels

# Bytes of shared memory that a block may ask for, by compute capability: CUDA C++ programming guide, table 30.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
HEADS = {"head 64": (14, 2, 64), "head 96": (12, 12, 96), "head 128": (12, 2, 128), "head 256": (8, 4, 256)}
VOCABULARY, INNER = 151_936, 8960  # of Qwen2.5-1.5B


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs."""

    kernel: str
    case: str
    capability: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a block

    def cells(self) -> list[str]:
        limit = f"{self.shared:,} of {SHARED[self.capability]:,}"
        return [self.kernel, self.case, f"sm_{self.capability}", str(self.registers), limit, str(self.spilled)]


HEAD = ["kernel", "case", "architecture", "registers", "shared memory, bytes", "spilled, bytes"]


class Target:
    """A driver of a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton caches by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(capability: int, works: dict[str, Callable[[], None]]) -> list[Compiled]:
    """What each kernel needs on that GPU; raises what Triton or its assembler raises."""
    found: dict[str, Compiled] = {}
    case, run = "", JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            registers, spilled = usage(kernel.asm["cubin"])
            found[kernel.hash] = Compiled(self.__name__, case, capability, registers, spilled, kernel.metadata.shared)

    driver.set_active(Target(capability))
    with patch.object(JITFunction, "run", compile_only):
        for case, work in works.items():  # noqa: B007 (read where kernels are launched)
            work()
    return list(found.values())


def decode(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    queries, key_heads, width = heads
    prompts, generations, tokens, longest = 4, 16, 160, 320

    def of(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    rows = prompts * generations
    kernels.decode_attention(
        of(rows, queries + 2 * key_heads, width),
        of(rows, 1, width),
        of(rows, 1, width // 2),
        (of(prompts, key_heads, longest, width), of(prompts, key_heads, longest, width)),
        (of(prompts, key_heads, generations, tokens, width), of(prompts, key_heads, generations, tokens, width)),
        torch.ones(prompts, dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
        width**-0.5,
    )


def logprobs(dtype: torch.dtype, *, entropy: bool = True) -> None:
    logits = torch.zeros(8, VOCABULARY, dtype=dtype, requires_grad=True)
    chosen, _ = kernels.token_logprobs(logits, torch.zeros(8, dtype=torch.long), 1.2, entropy=entropy)
    chosen.sum().backward()


def swiglu(dtype: torch.dtype) -> None:
    gate, up = torch.zeros(8, 2 * INNER, dtype=dtype, requires_grad=True).chunk(2, dim=-1)
    kernels.swiglu(gate, up).sum().backward()


def cases(*dtypes: torch.dtype) -> dict[str, Callable[[], None]]:
    """Launches of all kernels, by name."""
    works: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        works |= {f"{name}, {label}": partial(decode, heads=heads, dtype=dtype) for label, heads in HEADS.items()}
        works[f"{name}, vocabulary {VOCABULARY:,}"] = partial(logprobs, dtype=dtype)
        works[f"{name}, without entropy"] = partial(logprobs, dtype=dtype, entropy=False)
        works[f"{name}, width {INNER:,}"] = partial(swiglu, dtype=dtype)
    return works


def usage(binary: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a compiled kernel's threads."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", shown.stdout)
    assert match, shown.stdout
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", choices=SHARED, default=list(SHARED), metavar="80")
    parser.add_argument("--dtype", nargs="*", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--only", default="", help="cases whose names contain this", metavar="TEXT")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    given = parser.parse_args()
    works = cases(*(getattr(torch, name) for name in given.dtype))
    works = {name: work for name, work in works.items() if given.only in name}
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="countdown-compiled-")
    rows = [row for capability in given.capability for row in compiled(capability, works)]
    print(f"Triton {triton.__version__}\n\n{table(HEAD, [row.cells() for row in rows])}")
    write(given.out, [vars(row) for row in rows])


if __name__ == "__main__":
    main()
