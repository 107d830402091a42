"""On a pretended GPU, no operator mixes devices, from load to evaluation."""

from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import default_loss, save_tiny_model
from pretended import OnDevice, pretended
from transformers import GPT2Config, MistralConfig, PretrainedConfig, Qwen2Config

from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.lora import Lora
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.diagnostics import with_plain_logprobs
from grpo_cli.core.rl.grpo import advantages
from grpo_cli.core.rl.state import build_optimizer
from grpo_cli.core.rl.update import Objective, reference_logprobs, update
from grpo_cli.core.rollout import selfcheck
from grpo_cli.core.rollout.engine import uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams

PARAMS = SamplingParams(6, 1.2, 3)
TEXTS = ("Make 13 of 3, 5, 2.", "Make 25 of [4, 7, 3, 9], please.")


def train_and_evaluate(policy: Policy, *, optimizer: str, steps: int = 1) -> None:
    """A rollout, reference and update, and a greedy rollout, from samplers that last."""
    prompts = [policy.encode([{"role": "user", "content": text}]) for text in TEXTS]
    built = build_optimizer(policy, name=optimizer, weight_decay=0.0)
    for group in built.param_groups:
        group["lr"] = 1e-2
    reference, engine, micro_batch = Reference.of(policy), LocalEngine(policy), MicroBatch(3)
    objective = Objective(default_loss(beta=0.01), PARAMS.temperature, PARAMS.max_new_tokens)
    for step in range(steps):
        rollout = engine.sample(prompts, PARAMS, uniform=uniforms(0, step, range(2), 3, 6))
        sequences = Sequences(prompts, rollout.completions, [0] * 3 + [1] * 3)
        ref = reference_logprobs(reference, sequences, temperature=1.2, micro_batch=micro_batch)
        learned = advantages(torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.2]])).flatten()
        examples = Examples(sequences, learned, rollout.logprobs, ref)
        examples = with_plain_logprobs(examples, policy, objective.loss, temperature=1.2)
        metrics = update(policy, built, examples, objective, micro_batch=micro_batch)
        assert metrics["logprob_gap"] < 0.1 and metrics["weights_changed"] > 0.5
    uniform = uniforms(0, 9, range(2), 3, 6)
    replayed = engine.sample(prompts, PARAMS, uniform=uniform)  # weights are read in place after every update
    assert replayed.completions == LocalEngine(policy).sample(prompts, PARAMS, uniform=uniform).completions
    greedy = engine.sample(prompts, replace(PARAMS, num_generations=1), uniform=None)
    assert len(greedy.completions) == 2
    built.load_state_dict(built.state_dict())


def on_device(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, precision: str, adapter: Lora | None = None,
    checkpointing: bool = False, optimizer: str = "adamw", path: str = "packed",
) -> None:  # fmt: skip
    notes: list[str] = []
    with pretended(kind, monkeypatch):
        policy = selfcheck.load_checked(
            str(folder), name="tiny", device=kind, precision=precision, gradient_checkpointing=checkpointing,
            adapter=adapter, note=notes.append,
        )  # fmt: skip
        assert all(isinstance(weight, OnDevice) for weight in policy.model.parameters())
        assert policy.path == selfcheck.PATHS[path], notes
        train_and_evaluate(policy, optimizer=optimizer)


def test_what_is_wrong_on_the_device_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended("cuda", monkeypatch):
        there, host = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device.type == "cuda" and (there + 1).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="mixes devices"):
            there + host
    with pretended("mps", monkeypatch), pytest.raises(TypeError, match="no float64"):
        torch.ones(3, device="mps").sum(dtype=torch.float64)


def test_a_policy_trains_on_a_pretended_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, num_hidden_layers=1)
    on_device("cuda", tmp_path, monkeypatch, precision="bf16-master")


def test_an_8bit_step_never_waits_for_the_gpu(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    with pretended("cuda", monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
        model = torch.nn.Linear(64, 64, device="cuda")
        model.device = torch.device("cuda")  # type: ignore[assignment]
        built = build_optimizer(replace(tiny_policy, model=model), name="adamw8bit", weight_decay=0.0)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        wait = bitsandbytes.optim.optimizer.sync_gpu
        built.step()
        assert bitsandbytes.optim.optimizer.sync_gpu is wait  # others, such as paged ones, still wait
        assert (model.weight.abs() < 1).all() and built.state[model.weight]["state1"].dtype == torch.uint8
    assert not waits


WIDE: dict[str, object] = {"hidden_size": 64}
CASES: dict[str, tuple[type[PretrainedConfig], dict[str, object], dict[str, object]]] = {
    "Qwen2, float32": (Qwen2Config, WIDE, {"precision": "float32"}),
    "Qwen2, masters, 8-bit AdamW": (Qwen2Config, WIDE, {"precision": "bf16-master", "optimizer": "adamw8bit"}),
    "Qwen2, pure bfloat16": (Qwen2Config, WIDE, {"precision": "bf16", "checkpointing": True}),
    "GPT-2": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}, {"precision": "float32"}),
    "LoRA": (Qwen2Config, WIDE, {"precision": "bf16-master", "adapter": Lora(4, 8.0, ("q_proj", "down_proj"))}),
    "a window": (MistralConfig, {**WIDE, "sliding_window": 32}, {"precision": "float32", "path": "plain"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_path_and_precision_trains_on_a_pretended_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes, given = CASES[name]
    if "adapter" in given:
        pytest.importorskip("peft")
    save_tiny_model(tmp_path, kind, **changes)
    on_device("cuda", tmp_path, monkeypatch, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_policy_trains_on_a_pretended_mac(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, num_hidden_layers=1)
    on_device("mps", tmp_path, monkeypatch, precision=precision)
