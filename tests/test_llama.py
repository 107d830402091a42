"""The written-out forward pass against transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from grpo_cli.core.model import llama
from grpo_cli.core.model.attention import Decode, Packed, Prefill
from grpo_cli.core.model.llama import Pass, _as_one, adjoin, fits
from grpo_cli.core.model.load import load
from grpo_cli.core.model.packed import WIDE, PackedPath
from grpo_cli.core.model.policy import Policy, Sequences

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4,
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {}, {"tie_word_embeddings": False}, {"num_key_value_heads": 1}, {"kind": LlamaConfig},
    {"kind": LlamaConfig, "num_key_value_heads": 4, "head_dim": 12, "tie_word_embeddings": False},
    {"kind": LlamaConfig, "rope_parameters": LLAMA3}, {"kind": MistralConfig, "sliding_window": None, "head_dim": 16},
]  # fmt: skip
TOKENS = torch.arange(3, 33).view(6, 5)  # of 6 prompts, the last token of which is decoded


def both(policy: Policy, dtype: torch.dtype, *, in_place: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (6, V) of one token after random prompts: by transformers, and by the step."""
    found = []
    positions = torch.arange(4).expand(6, 4)
    for written in (None, Pass(policy.model, longest=5, dtype=dtype, in_place=in_place)):
        prefill = Prefill()
        policy.hidden(TOKENS[:, :4], positions, prefill)
        plan = Decode(prefill, torch.full((6,), 4), num_generations=1, max_new_tokens=1)
        last, place = TOKENS[:, 4], torch.full((6,), 4)
        logits = policy.logits(policy.hidden(last[:, None], place[:, None], plan)[:, 0])
        found.append(logits if written is None else written.logits(written.hidden(last, place, plan)))
    return found[0], found[1]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_step_gives_the_logits_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = load(str(save_tiny_model(tmp_path, **changes)), device="cpu", precision="float32")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        for in_place in (False, True):
            theirs, ours = both(policy, torch.float32, in_place=in_place)
            assert theirs.abs().max() > 1
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("changes", CHANGES)
def test_a_packed_row_gives_the_gradients_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = load(str(save_tiny_model(tmp_path, **changes)), device="cpu", precision="float32")
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    lengths = [3, 7, 1, 5]
    tokens = torch.randint(0, 800, (9 + 4 + sum(lengths),), generator=rng)
    found = []
    for written in (False, True):
        plan = Packed([9, 4], lengths, [0, 1, 1, 0], torch.device("cpu"))
        if written:
            hidden = Pass(policy.model, longest=20, dtype=torch.float32).hidden(
                tokens, plan.positions[0], plan, packed=True
            )
        else:
            hidden = policy.hidden(tokens[None], plan.positions, plan)[0]
        policy.model.zero_grad()
        policy.logits(hidden).log_softmax(-1)[plan.predecessors, tokens[13:]].sum().backward()
        found.append([hidden.detach(), *(parameter.grad for parameter in policy.model.parameters())])
    for theirs, ours in zip(*found, strict=True):
        assert theirs is not None and ours is not None
        torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=2e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_step_computes_in_bfloat16(tiny_folder: Path, in_place: bool) -> None:
    policy = load(str(tiny_folder), device="cpu", precision="bf16")
    with torch.no_grad():
        theirs, ours = both(policy, torch.bfloat16, in_place=in_place)
        exact, _ = both(load(str(tiny_folder), device="cpu", precision="float32"), torch.float32)
    assert ours.dtype == torch.bfloat16
    spread = exact.std()
    assert (ours.float() - exact).std() < 0.03 * spread
    assert (theirs.float() - exact).std() < 0.03 * spread


def test_models_that_the_step_does_not_fit() -> None:
    shape: dict[str, Any] = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}

    def fit(config: PretrainedConfig) -> bool:
        return fits(AutoModelForCausalLM.from_config(config))

    assert fit(Qwen2Config(**shape)) and fit(LlamaConfig(**shape)) and fit(MistralConfig(**shape))
    assert not fit(Qwen2Config(rope_parameters=yarn, **shape)) and not fit(Qwen3Config(**shape))
    assert not fit(LlamaConfig(attention_bias=True, **shape)) and not fit(LlamaConfig(mlp_bias=True, **shape))


@pytest.mark.parametrize("width", [32, WIDE])
def test_a_wide_model_is_decoded_in_bfloat16_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    policy = load(str(save_tiny_model(tmp_path, hidden_size=width)), device="cpu", precision="bf16-master")
    made: list[torch.dtype] = []
    monkeypatch.setattr(llama, "Pass", lambda model, *, dtype, **_: made.append(dtype))
    PackedPath().step(policy, 8)
    assert made == [torch.bfloat16 if width == WIDE else torch.float32]


def test_weights_that_lie_beside_each_other_are_multiplied_at_once_learn_and_are_saved_as_before(
    tiny_folder: Path, tmp_path: Path
) -> None:
    apart, joined = (load(str(tiny_folder), device="cpu", precision="float32") for _ in range(2))
    with torch.inference_mode():
        adjoin(joined.model)
        mlp = joined.model.get_decoder().layers[0].mlp
        projections = [mlp.gate_proj.weight, mlp.up_proj.weight]
        assert _as_one(projections) is not None and _as_one(projections[::-1]) is None
        theirs, ours = both(joined, torch.float32, in_place=True)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    sequences = Sequences([[5, 9, 200]], [[11, 12], [13]], [0, 0])
    for policy in (apart, joined):
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
        policy.logprobs(sequences, temperature=1.0)[0].sum().backward()
        optimizer.step()
    joined.save(tmp_path)
    saved = load(str(tmp_path), device="cpu", precision="float32").model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in apart.model.state_dict().items())
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == sum(
        path.stat().st_size for path in tiny_folder.glob("*.safetensors")
    )
