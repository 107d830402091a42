"""The Triton kernels compile for GPUs that are not here, and fit in their registers and shared memory."""

from pathlib import Path
from typing import Any

import pytest
from test_benchmarks import run

pytest.importorskip("triton")
KERNELS = {"_decode_attention", "_logprobs", "_logprobs_backward", "_swiglu", "_swiglu_backward"}
SMALLEST = 101_376  # bytes of shared memory a block on sm_86, 89 and 120: one size of block serves all GPUs


@pytest.fixture(autouse=True)
def compile_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def compiled(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    _, written = run("compiled.py", folder / "compiled.json", *arguments)
    rows: list[dict[str, Any]] = written["results"]
    return rows


def test_a_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--capability", 90, "--dtype", "bfloat16", "--only", "width")
    assert {row["kernel"] for row in rows} == {"_swiglu", "_swiglu_backward"}
    assert all(0 < row["registers"] <= 255 and row["spilled"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_every_kernel_fits_in_the_shared_memory_of_a_block(tmp_path: Path, capability: int) -> None:
    rows = compiled(tmp_path, "--capability", capability)
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["capability"] for row in rows} == {capability}
    assert [row for row in rows if row["shared"] > SMALLEST] == []
    assert [row for row in rows if row["spilled"]] == []
