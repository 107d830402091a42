"""Peaks of devices: by name where the table has them, else measured."""

import math

import pytest
import torch

from grpo_cli.core.perf.hardware import hardware, known, measure


@pytest.mark.parametrize(
    ("name", "tflops", "gigabytes"),
    [
        ("NVIDIA H200", 989, 4800),
        ("NVIDIA H100 80GB HBM3", 989, 3350),
        ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA H100 NVL", 836, 3900),
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100-SXM4-80GB", 312, 2039),
        ("NVIDIA A100 80GB PCIe", 312, 1935),
        ("NVIDIA L40S", 362, 864),
        ("NVIDIA L4", 121, 300),
        ("NVIDIA A10G", 70, 600),
        ("NVIDIA A10", 125, 600),
        ("NVIDIA GeForce RTX 4090", 165.2, 1008),
        ("NVIDIA RTX 6000 Ada Generation", 364, 960),
        ("NVIDIA B200", 2250, 8000),
        ("AMD Instinct MI300X", 1307, 5300),
    ],
)
def test_known_devices(name: str, tflops: float, gigabytes: float) -> None:
    peak = known(name, torch.bfloat16)
    assert peak is not None
    assert (peak.flops, peak.bandwidth) == (tflops * 1e12, gigabytes * 1e9)


@pytest.mark.parametrize("name", ["Tesla T4", "Tesla V100-SXM2-16GB", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "?"])
def test_other_devices_are_not_mistaken_for_them(name: str) -> None:
    assert known(name, torch.bfloat16) is None


def test_the_table_says_nothing_of_float32() -> None:
    assert known("NVIDIA H200", torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_rates_are_finite_and_positive(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.perf.hardware.MATRIX", 128)
    peak = measure(torch.device("cpu"), dtype)
    assert all(math.isfinite(rate) and rate > 1e6 for rate in (peak.flops, peak.bandwidth))


def test_a_cpu_is_measured_once_and_says_so() -> None:
    cpu = torch.device("cpu")
    found = hardware(cpu, torch.float32)
    assert found.source == "measured"
    assert hardware(cpu, torch.float32) is found
    record = found.record()
    assert record["tflops"] == pytest.approx(found.peak.flops / 1e12)
