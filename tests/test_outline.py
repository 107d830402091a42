"""What is kept account of on the meta device is what real passes take."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_cli.core.model import attention, qwen2
from grpo_cli.core.model.load import load, skeleton
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.perf.outline import Ledger, checkpointed, traced, traced_prefill


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real passes on the CPU take the paths of CUDA; attention takes up what flash attention does."""
    monkeypatch.setattr(attention, "maskless", lambda device: True)
    monkeypatch.setattr(attention, "_aligned", lambda queries, keys, device: torch.empty(0))
    monkeypatch.setattr(attention, "_causal", lambda query, key, value, _: attention.flash_outline(query, key, value))
    monkeypatch.setattr(attention, "_biased", lambda query, key, value, *_: attention.flash_outline(query, key, value))
    monkeypatch.setattr(qwen2, "fits", lambda model: False)


def even(prompts: int, generations: int, prompt_tokens: int, new_tokens: int) -> Sequences:
    prompt_index = [prompt for prompt in range(prompts) for _ in range(generations)]
    return Sequences([[1] * prompt_tokens] * prompts, [[2] * new_tokens] * len(prompt_index), prompt_index)


def outlined(folder: Path, **changes: object) -> Policy:
    real = load(str(folder), device="cpu", precision="float32")
    model = skeleton(str(folder), dtype=torch.float32, layers=real.model.config.num_hidden_layers)
    return replace(real, model=model, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 20, 9), (1, 8, 5, 30), (4, 2, 60, 4)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("logit_chunk", [0, 7])
@pytest.mark.parametrize(("learn", "again"), [(True, False), (True, True), (False, False)])
def test_what_is_traced_without_memory_is_what_the_real_model_takes(
    tiny_folder: Path,
    as_on_a_gpu: None,
    shape: tuple[int, int, int, int],
    checkpointing: bool,
    logit_chunk: int,
    learn: bool,
    again: bool,
) -> None:
    sequences = even(*shape)
    real = replace(load(str(tiny_folder), device="cpu", precision="float32"), logit_chunk=logit_chunk)
    found = []
    for policy in (real, outlined(tiny_folder, logit_chunk=logit_chunk)):
        with checkpointed(policy.model, wanted=checkpointing):
            found.append(traced(policy, sequences, learn=learn, again=again))
    for measured, planned in zip(*found, strict=True):
        assert sum(planned.values()) == pytest.approx(sum(measured.values()), rel=0.1)
        assert planned.keys() == measured.keys()
    assert len(found[0]) == (2 if learn else 1)


def test_the_prefill_is_traced_as_it_is(tiny_folder: Path, as_on_a_gpu: None) -> None:
    real, planned = load(str(tiny_folder), device="cpu", precision="float32"), outlined(tiny_folder)
    measured = traced_prefill(real, 3, 40)["activations"]
    assert traced_prefill(planned, 3, 40)["activations"] == pytest.approx(measured, rel=0.1)


def test_a_ledger_finds_the_peak_and_what_made_it() -> None:
    with Ledger([]) as ledger:
        first = torch.zeros(100)
        second = torch.zeros(50)
        del first
        third = torch.zeros(30)
        view = third[:3].mul_(2)
        del second, third, view
    assert ledger.peak(0, len(ledger.events), str) == {"0": 400, "1": 200}
    assert ledger.peak(3, len(ledger.events), str) == {"1": 200, "2": 120}
    assert not ledger.numbers
