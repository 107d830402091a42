"""What only a CUDA device can show: that its fast paths agree with the plain ones. `pytest -m gpu` runs them."""

from pathlib import Path

import pytest
import torch
from test_decode import Kept, assert_same, rolled
from test_policy import gradients, ragged

from grpo_cli.core.model import attention
from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.decode import record
from grpo_cli.core.task.prompts import SYSTEM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def policy(tiny_folder: Path) -> Policy:
    return load(str(tiny_folder), device="cuda", precision="float32")


def prompts_of(policy: Policy) -> list[list[int]]:
    asked = ("Make 13 of [3, 5, 2].", "Make 25 of [4, 7, 3, 9], please.")
    return [policy.encode([{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]) for text in asked]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_cuda_graph_samples_what_the_eager_sampler_does(policy: Policy, temperature: float) -> None:
    prompts, kept = prompts_of(policy), Kept()
    for step in range(3):
        expected = rolled(policy, prompts, static=False, step=step, temperature=temperature)
        assert_same(
            rolled(policy, prompts, static=True, step=step, temperature=temperature, kept=kept), expected, atol=1e-4
        )
    assert len(kept) == 1


def test_a_cuda_graph_follows_the_weights(policy: Policy) -> None:
    prompts, kept = prompts_of(policy), Kept()
    before = rolled(policy, prompts, static=True, kept=kept)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    found = rolled(policy, prompts, static=True, kept=kept)
    assert_same(found, rolled(policy, prompts, static=False), atol=1e-4)
    assert found.completions != before.completions


def test_the_memory_of_a_static_sampler_is_given_back(policy: Policy) -> None:
    prompts, kept = prompts_of(policy), Kept()
    rolled(policy, prompts, static=True, kept=kept)
    held = torch.cuda.memory_allocated()
    assert len(kept) == 1
    kept.clear()
    assert torch.cuda.memory_allocated() < held


def test_a_capture_that_fails_leaves_the_stream_that_was_current() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.current_stream(device)
    numbers = torch.ones(3, device=device)
    with pytest.raises(RuntimeError):
        record(lambda: print(numbers.sum().item()), device)
    assert torch.cuda.current_stream(device) == before


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_flash_attention_gives_the_log_probabilities_of_the_masked_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, gradient_checkpointing: bool
) -> None:
    policy = load(str(tiny_folder), device="cuda", precision="bf16", gradient_checkpointing=gradient_checkpointing)
    exact = load(str(tiny_folder), device="cpu", precision="float32")
    sequences = ragged(37)
    found = {}
    for maskless in (False, True):
        monkeypatch.setattr(attention, "maskless", lambda device, chosen=maskless: chosen)
        logprobs, _ = policy.logprobs(sequences, temperature=1.3)
        found[maskless] = [
            logprobs.detach().cpu(),
            *(part.cpu() for part in gradients(policy.model, logprobs).values()),
        ]
    monkeypatch.setattr(attention, "maskless", lambda device: False)
    logprobs, _ = exact.logprobs(sequences, temperature=1.3)
    expected = [logprobs.detach(), *gradients(exact.model, logprobs).values()]
    for masked, flash, truth in zip(found[False], found[True], expected, strict=True):
        # Rounding to bfloat16 is all that may part them: neither is further from the truth than the other.
        assert (flash.float() - truth).norm() < 2 * (masked.float() - truth).norm() + 1e-3 * truth.norm()
