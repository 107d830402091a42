"""Each architecture computes what transformers computes, on the fastest path that does, or is refused by a sentence."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from architectures import SHORT, WINDOW, loaded, tiny_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from grpo_cli.core import model as model_package
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import Policy, Sequences, checkpoint_layers
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rollout import selfcheck
from grpo_cli.core.rollout.engine import uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.selfcheck import checked

SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def as_loaded(model: PreTrainedModel, scale: float = 0.25, seed: int = 1) -> Policy:
    """A policy of weights so large that its distributions are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return loaded(model.eval())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_gradient_checkpointing_keeps_dropout_off(kind: str, dropout: float) -> None:
    if kind == "gpt2":
        config = GPT2Config(**GPT, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        model: PreTrainedModel = GPT2LMHeadModel(config)
    else:
        shape = {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
        model = OPTForCausalLM(OPTConfig(**shape, dropout=dropout, attention_dropout=dropout, layerdrop=dropout))
    policy = as_loaded(model)
    checkpoint_layers(model)
    _, outcome = checked(policy, SHORT, checkpointing=True)
    assert outcome.path == "packed" and outcome.gap < 1e-4


def test_a_layer_that_draws_random_numbers_is_refused() -> None:
    policy = as_loaded(GPT2LMHeadModel(GPT2Config(**GPT)))
    policy.model.transformer.drop.train()
    with pytest.raises(CountdownError, match="a layer draws random numbers"):
        checked(policy, SHORT)


@pytest.mark.parametrize("precision", ["float32", "bf16-master"])
def test_an_encoder_is_refused(precision: str) -> None:
    policy = replace(as_loaded(BertLMHeadModel(BertConfig(**SHAPE, intermediate_size=48))), precision=precision)
    with pytest.raises(CountdownError, match="later tokens") as caught:
        checked(policy, SHORT)
    assert "BertLMHeadModel" in caught.value.message and caught.value.exit_code == 2


def test_weights_that_give_no_numbers_are_refused() -> None:
    policy = as_loaded(GPT2LMHeadModel(GPT2Config(**GPT)))
    policy.model.transformer.ln_f.weight.data.fill_(float("inf"))
    with pytest.raises(CountdownError, match="not finite"):
        checked(policy, SHORT)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [DYNAMIC, LONG | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}])
def test_positions_that_depend_on_length_are_refused_beyond_the_original_context(rope: dict[str, object]) -> None:
    context = 32 if rope["rope_type"] == "dynamic" else 64
    model = LlamaForCausalLM(LlamaConfig(**DECODER, max_position_embeddings=context, rope_parameters=dict(rope)))
    policy, _ = checked(as_loaded(model), SHORT)
    do = partial(LocalEngine(policy).sample, SHORT)
    assert len(do(SamplingParams(21, num_generations=2), uniform=uniforms(0, 0, [0, 1], 2, 21)).completions) == 4
    with pytest.raises(CountdownError, match="the context of `a model` is 32: only rows of one length"):
        do(SamplingParams(22, num_generations=2), uniform=uniforms(0, 0, [0, 1], 2, 22))


@pytest.mark.parametrize("kind", ["doge", "moshi"])
def test_lengths_at_which_an_architecture_computes_otherwise_are_refused(kind: str) -> None:
    (policy, _), most = checked(loaded(tiny_model(kind)), SHORT), WINDOW - len(SHORT[1])
    do = partial(LocalEngine(policy).sample, SHORT)
    assert len(do(SamplingParams(most), uniform=None).completions) == 2
    with pytest.raises(CountdownError, match=f"context of `a model` is {WINDOW}: only rows of one length"):
        do(SamplingParams(most + 1), uniform=None)


def test_positions_that_end_are_refused_beyond_their_end() -> None:
    policy = as_loaded(GPT2LMHeadModel(GPT2Config(**GPT)))
    with pytest.raises(CountdownError, match="up to 65 tokens, and the context of `a model` is 64: it has no"):
        LocalEngine(policy).sample(SHORT, SamplingParams(54), uniform=None)


def test_nothing_is_said_of_a_model_on_the_fastest_path(tiny_folder: Path) -> None:
    notes: list[str] = []
    selfcheck.load_checked(str(tiny_folder), name="tiny", device="cpu", precision="float32", note=notes.append)
    assert notes == []


def test_a_reference_stays_on_its_path() -> None:
    policy, _ = checked(as_loaded(MistralForCausalLM(MistralConfig(**DECODER, sliding_window=4))), SHORT)
    assert Reference.of(policy).policy.path == PlainPath()


def test_fused_kernels_that_do_not_run_are_left_in_one_line(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(model_package, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "grpo_cli.core.model.kernels", None)  # as where Triton is missing
    policy, outcome = checked(replace(tiny_policy, path=PackedPath(fused=True)))
    assert policy.path == PackedPath()
    assert "runs on the fast path without fused kernels: " in outcome.sentence(policy)


@pytest.mark.parametrize("precision", ["float32", "bf16-master", "bf16"])
@pytest.mark.parametrize("kind", ["granite", "cohere", "nanochat"])
def test_logits_scaled_or_capped_after_the_head_are_seen_in_every_precision(kind: str, precision: str) -> None:
    model = tiny_model(kind)
    model = model.to(torch.bfloat16) if precision == "bf16" else model
    policy, outcome = checked(replace(loaded(model), precision=precision), SHORT)
    assert outcome.path == "packed, own logits"
    assert "changes logits after its output matrix" in outcome.sentence(policy)


def test_a_model_whose_logits_are_all_zero_is_refused_on_every_path(tiny_policy: Policy) -> None:
    torch.nn.init.zeros_(tiny_policy.model.get_output_embeddings().weight)
    with pytest.raises(CountdownError, match="all zero or not finite"):
        checked(tiny_policy)


ROWS = Sequences(SHORT, [[5, 6, 7, 8], [9, 10, 11]], [0, 1])


def in_bfloat16(precision: str, scale: float, seed: int) -> Policy:
    torch.manual_seed(seed)
    policy = as_loaded(LlamaForCausalLM(LlamaConfig(**DECODER)), scale, seed)
    if precision == "bf16":
        policy.model.to(torch.bfloat16)
    return replace(policy, precision=precision)


@pytest.mark.parametrize(
    ("precision", "scale", "seed"), [("bf16", 0.25, 0), ("bf16", 0.5, 9), ("bf16", 1.0, 4), ("bf16-master", 0.5, 15)]
)
def test_a_right_gradient_passes_however_sharp_the_model(precision: str, scale: float, seed: int) -> None:
    policy = in_bfloat16(precision, scale, seed)
    before = [(weight.data_ptr(), weight.dtype) for weight in policy.model.parameters()]
    selfcheck._compare_gradients(policy, ROWS)
    assert [(weight.data_ptr(), weight.dtype) for weight in policy.model.parameters()] == before


@pytest.mark.parametrize("precision", ["bf16", "bf16-master"])
def test_a_wrong_gradient_is_rejected_in_bfloat16(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, right = in_bfloat16(precision, 0.25, 0), Policy.logprobs
    monkeypatch.setattr(Policy, "logprobs", lambda *given, **options: [1.4 * right(*given, **options)[0]])
    with pytest.raises(selfcheck.Disagreement, match="gradients differ by"):
        selfcheck._compare_gradients(policy, ROWS)
