"""A step's floor: every term by hand, the original's workload, operations as torch counts them; peaks of devices."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_cli.core.perf.roofline import (
    Cost,
    Peak,
    Shape,
    Widths,
    Work,
    costs,
    describe,
    hardware,
    known,
    measure,
    packed,
    prefill,
    shape_of,
)

# W = 2 * 4 * (2 * 3 * 2 + 3 * 5) = 216, V = 4 * 10 = 40, A = 4 * 2 * 2 * 2 = 32, keys and values 2 * 2 * 1 * 2 = 8
TINY = Shape(layers=2, width=4, heads=2, key_value_heads=1, head_width=2, intermediate=5, vocabulary=10, parameters=300)
WORK = Work(prompts=[3, 2], completions=[2, 1, 3, 1], generations=2)
FLOAT32 = Widths(compute=4, weight=4, master=0, moments=8)
QWEN = Shape(28, 1536, 12, 2, 128, 8960, 151_936, 1_543_714_304)


def test_the_terms_of_a_tiny_shape() -> None:
    assert (TINY.body, TINY.head, TINY.pair, TINY.cached) == (216, 40, 32, 8)


def test_every_phase_by_hand() -> None:
    found = costs(TINY, WORK, FLOAT32)
    # 5 tokens, 2 heads' rows, 6 + 3 pairs
    assert found["prefill"] == Cost(2 * 216 * 5 + 2 * 40 * 2 + 32 * 9, 1200)
    # 3 tokens; pairs: 3 + 1 of the first row, 2 * 2 + 1 + 2 of the third. Read: the weights twice, the prompts' 3 * 1
    # and 2 * 2 tokens once for each group and step, their own 1 and 1 + 2
    assert found["decode"] == Cost(2 * 256 * 3 + 32 * 11, 4 * (300 * 2 + 8 * (3 + 4 + 1 + 3)))
    # 5 + 7 tokens; pairs: 9 of the prompts, 3 * 2 + 3, 3 * 1 + 1, 2 * 3 + 6, 2 * 1 + 1
    forward = 2 * 216 * 12 + 2 * 40 * 7 + 32 * (9 + 9 + 4 + 12 + 3)
    assert found["reference"] == Cost(forward, 1200)
    assert found["update"] == Cost(3 * forward, 3 * 1200)
    # gradient twice, weight and moments both ways
    assert found["optimizer"] == Cost(0, 300 * (8 + 8 + 16))


def test_rows_without_advantage_and_the_reference_cost_nothing_when_they_are_skipped() -> None:
    work = Work([3, 2], [2, 1, 3, 1], 2, reference=False, learned=[1], updates=2)
    found = costs(TINY, work, FLOAT32)
    assert found["reference"] == Cost(0, 0)
    forward = 2 * 216 * (3 + 1) + 2 * 40 * 1 + 32 * (6 + 4)  # the first prompt and one token of its second completion
    assert found["update"] == Cost(2 * 3 * forward, 2 * 3 * 1200)
    nothing = costs(TINY, Work([3], [2], 1, learned=[]), FLOAT32)
    assert nothing["update"] == nothing["optimizer"] == Cost(0, 0)


def test_a_master_of_float32_is_read_and_written_beside_bfloat16_weights() -> None:
    assert Widths(compute=2, weight=2, master=4, moments=2).optimizer == 4 + 2 * 6 + 2
    assert Widths(compute=2, weight=2, master=0, moments=4).optimizer == 4 + 2 * 4 + 4


def test_a_phase_is_bound_by_its_slower_half() -> None:
    peak = Peak(flops=100.0, bandwidth=10.0)
    assert peak.floor(Cost(300, 20)) == 3.0
    assert peak.floor(Cost(100, 20)) == 2.0


def test_utilisation_and_share_of_the_floor() -> None:
    found = describe({"decode": Cost(100, 20), "update": Cost(300, 20)}, Peak(100.0, 10.0), 10.0)
    assert found["mfu"] == pytest.approx(4 / 10)
    assert found["floor_share"] == pytest.approx((2 + 3) / 10)
    assert found["floor/decode"] == 2.0
    assert found["arithmetic/decode"] == 1.0


def test_the_floor_of_the_original_workload_on_an_h200() -> None:
    """../facts: predicted 0.33 s with the prompt's keys read for each completion; about 0.9 ms a token."""
    work = Work([290] * 4, [160] * 64, 16)
    found = costs(QWEN, work, Widths(compute=2, weight=2, master=4, moments=2))
    peak = Peak(790e12, 4.3e12)
    floors = {name: peak.floor(cost) for name, cost in found.items()}
    assert floors["decode"] / 159 == pytest.approx(0.76e-3, rel=0.02)
    assert floors["reference"] == pytest.approx(44.7e-3, rel=0.02)
    assert floors["update"] == pytest.approx(3 * 44.7e-3, rel=0.02)
    assert sum(floors.values()) == pytest.approx(0.31, rel=0.02)
    read_apart = 15 * 4 * 290 * 159 * QWEN.cached * 2 / peak.bandwidth
    assert sum(floors.values()) + read_apart == pytest.approx(0.33, rel=0.02)


def counted(model: Qwen2ForCausalLM, tokens: int, **options: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), **options)
    return int(counter.get_total_flops())


def test_operations_are_those_that_torch_counts() -> None:
    config = Qwen2Config(
        vocab_size=400, hidden_size=96, intermediate_size=224, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager")
    shape = shape_of(model.config, model.num_parameters())
    # Eager attention computes the whole square, of which the formulas count the causal half.
    half = shape.pair * 40 * 39 // 2
    rotary = counted(model, 40, logits_to_keep=1) - half - prefill(shape, Work([40], [1], 1), FLOAT32).flops
    assert 0 <= rotary <= 0.001 * half
    row = packed(shape, Work([10], [30], 1), [0])
    assert counted(model, 40) - half - 2 * shape.head * 10 == pytest.approx(row, rel=0.001)


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
    monkeypatch.setattr("grpo_cli.core.perf.roofline.MATRIX", 128)
    peak = measure(torch.device("cpu"), dtype)
    assert all(math.isfinite(rate) and rate > 1e6 for rate in (peak.flops, peak.bandwidth))


def test_a_cpu_is_measured_once_and_says_so() -> None:
    cpu = torch.device("cpu")
    found = hardware(cpu, torch.float32)
    assert found.source == "measured"
    assert hardware(cpu, torch.float32) is found
    record = found.record()
    assert record["tflops"] == pytest.approx(found.peak.flops / 1e12)
