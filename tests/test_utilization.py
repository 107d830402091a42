"""A step's operations by hand; peak rates of devices."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from architectures import loaded, tiny_model
from conftest import save_tiny_model

from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.perf import utilization
from grpo_cli.core.perf.utilization import Meter, Operations, known, measure, operations, peak_tflops
from grpo_cli.core.rollout.engine import Rollout

TINY = Operations(token=10, logits=4)
GROUPS = [(3, [2, 1]), (2, [3])]


def test_operations_by_hand() -> None:
    assert TINY.forward(GROUPS) == 10 * (5 + 6) + 4 * 6  # 5 prompt and 6 completion tokens
    assert TINY.forward([]) == TINY.forward([], shared=1) == 0
    assert TINY.forward(GROUPS, shared=2) == TINY.forward(GROUPS) - 10 * 2  # once instead of twice


def rollout(completions: list[list[int]], *, computed: int) -> Rollout:
    return Rollout(completions, [], [], {}, computed)


def test_metrics_of_a_step_by_hand(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of six and five tokens, of which the first four are the same."""
    monkeypatch.setattr("grpo_cli.core.perf.utilization.peak_tflops", lambda *_: 1e-10)  # 100 operations a second
    meter, sampled = Meter(tiny_policy, TINY), [(6, [2, 1]), (5, [3, 1])]
    meter.sampled([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9]], rollout([[1, 1], [1], [1, 1, 1], [2]], computed=20))
    metrics = meter.metrics(reference=sampled, learned=[(6, [1])], updates=2, seconds=7.0)
    needed = 2 * TINY.forward(sampled, shared=4) + 2 * 3 * TINY.forward([(6, [1])])
    assert metrics["mfu"] == pytest.approx(needed / 700)
    assert metrics["padding"] == pytest.approx(1 - (4 + 2 + 1 + 1 + 2) / 20)  # the last tokens are not fed back


def test_a_rank_without_prompts_and_an_unknown_model_leave_metrics_out(tiny_policy: Policy) -> None:
    meter = Meter(tiny_policy, None)
    meter.sampled([], rollout([], computed=0))
    assert meter.metrics(reference=[], learned=[], updates=1, seconds=1.0).keys() == {"peak_memory"}


def test_operations_of_a_small_qwen2_by_hand(tiny_policy: Policy, tmp_path: Path) -> None:
    # 2 layers of width 32: 4 query and 2 key heads of width 8, three matrices of 48; 832 tokens
    matrices = 2 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48)
    untied = load(str(save_tiny_model(tmp_path / "untied", tie_word_embeddings=False)), device="cpu")
    for policy in (tiny_policy, untied):
        assert operations(policy) == Operations(2 * matrices, 2 * 832 * 32)


def test_windows_experts_and_frozen_weights_are_left_out(tiny_policy: Policy) -> None:
    assert operations(loaded(tiny_model("mistral"))) is None
    assert operations(loaded(tiny_model("mixtral"))) is None
    next(tiny_policy.model.parameters()).requires_grad_(False)
    assert operations(tiny_policy) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 836),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert known(name) == tflops


@pytest.mark.parametrize("name", ["Tesla T4", "Tesla V100-SXM2-16GB", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "?"])
def test_other_devices_are_not_mistaken_for_them(name: str) -> None:
    assert known(name) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_rates_are_finite_and_positive(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "MATRIX", 128)
    rate = measure(torch.device("cpu"), dtype)
    assert math.isfinite(rate) and rate > 1e-6


def test_a_slow_device_is_measured_for_a_second_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=2)
    monkeypatch.setattr(utilization, "MATRIX", 8)
    monkeypatch.setattr("grpo_cli.core.perf.utilization.time.perf_counter", lambda: next(clock))
    measure(torch.device("cpu"), torch.float32)
    assert next(clock) == 4  # one product, of two seconds


def test_a_cpu_is_measured_once() -> None:
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, "float32") == peak_tflops(cpu, "float32")
