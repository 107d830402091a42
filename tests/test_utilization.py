"""A step's operations by hand and as torch counts them; peak rates of devices."""

import itertools
import math

import pytest
import torch
from architectures import documented, loaded, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.perf import utilization
from grpo_cli.core.perf.utilization import Meter, Operations, known, measure, operations, peak_tflops
from grpo_cli.core.rollout.engine import Rollout

TINY = Operations(token=10, logits=4, pair=3)
GROUPS = [(3, [2, 1]), (2, [3])]
QUICK = ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "cohere", "mixtral")
PACKED = [kind for kind, path in documented().items() if path.startswith("packed")]


def test_operations_by_hand() -> None:
    # 5 prompt and 6 completion tokens; pairs: 6 + (3 * 2 + 3) + (3 * 1 + 1), 3 + (2 * 3 + 6)
    assert TINY.forward(GROUPS) == 10 * 11 + 4 * 6 + 3 * (19 + 15)
    # the last token of each completion is not fed in; one prediction per prompt
    assert TINY.sample(GROUPS) == 10 * 8 + 4 * (3 + 2) + 3 * (6 + 4 + 3 + (2 * 2 + 3))
    assert TINY.forward([]) == TINY.sample([]) == TINY.forward([], shared=1) == 0
    # two shared tokens, and the three pairs among them, once instead of twice
    assert TINY.forward(GROUPS, shared=2) == TINY.forward(GROUPS) - 10 * 2 - 3 * 3


def rollout(completions: list[list[int]], *, computed: int) -> Rollout:
    return Rollout(completions, [], [], {}, computed)


def test_metrics_of_a_step_by_hand(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.perf.utilization.peak_tflops", lambda *_: 1e-10)  # 100 operations a second
    meter = Meter(tiny_policy, TINY)
    meter.sampled([[1, 2, 3], [1, 2]], rollout([[1, 1], [1], [1, 1, 1], [2]], computed=10))
    sampled = [(3, [2, 1]), (2, [3, 1])]
    assert meter.sampled_groups == sampled
    metrics = meter.metrics(reference=sampled, learned=[(3, [1])], updates=2, seconds=7.0)
    needed = TINY.sample(sampled) + TINY.forward(sampled) + 2 * 3 * TINY.forward([(3, [1])])
    assert metrics["mfu"] == pytest.approx(needed / 700)
    assert metrics["padding"] == pytest.approx(1 - 8 / 10)


def test_a_shared_start_counts_once_in_the_metrics_of_a_step(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_cli.core.perf.utilization.peak_tflops", lambda *_: 1e-10)  # 100 operations a second
    meter, groups = Meter(tiny_policy, TINY), [(6, [2]), (5, [3])]
    meter.sampled([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9]], rollout([[1, 1], [1, 1, 1]], computed=20))
    metrics = meter.metrics(reference=groups, learned=groups, updates=1, seconds=7.0)
    needed = TINY.sample(groups, shared=4) + 4 * TINY.forward(groups, shared=4)
    assert metrics["mfu"] == pytest.approx(needed / 700)
    assert metrics["padding"] == pytest.approx(1 - (4 + 2 + 1 + 1 + 2) / 20)


def test_a_rank_without_prompts_and_an_unknown_model_leave_metrics_out(tiny_policy: Policy) -> None:
    meter = Meter(tiny_policy, None)
    meter.sampled([], rollout([], computed=0))
    assert meter.metrics(reference=[], learned=[], updates=1, seconds=1.0).keys() == {"peak_memory"}


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in PACKED if kind not in QUICK)]
)
def test_operations_are_those_that_torch_counts_or_unknown(kind: str) -> None:
    policy = loaded(tiny_model(kind))
    found = operations(policy)
    if found is None:
        assert kind not in ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "cohere")
        return
    assert policy.path == PackedPath() and policy.model.config._attn_implementation == "countdown_shared_prefix"
    policy.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.model(input_ids=torch.randint(3, 96, (1, 40)), use_cache=False)
    # Attention computes the whole square, of which the causal half counts; logits of all 40 tokens are computed.
    assert found.forward([(1, [39])]) + found.logits + found.pair * 40 * 39 // 2 == counter.get_total_flops()


def test_operations_of_a_small_qwen2_by_hand(tiny_policy: Policy) -> None:
    # 2 layers of width 32: 4 query and 2 key heads of width 8, three matrices of 48; 832 tokens
    matrices = 2 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48)
    found = operations(tiny_policy)
    assert found is not None and (found.logits, found.pair) == (2 * 832 * 32, 4 * 2 * 4 * 8)
    assert 2 * matrices <= found.token <= 2.01 * matrices  # and the rotary angles


def test_windows_and_frozen_weights_are_left_out(tiny_policy: Policy) -> None:
    assert operations(tiny_policy) is not None
    assert operations(loaded(tiny_model("mistral"))) is None
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
