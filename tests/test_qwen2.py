"""The written-out forward pass against transformers' own."""

from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from grpo_cli.core.model.attention import Decode, Packed, Prefill
from grpo_cli.core.model.load import load, load_tokenizer
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.qwen2 import Pass, _as_one, adjoin, fits
from grpo_cli.core.sampling.params import SamplingParams
from grpo_cli.core.sampling.rollout import sample

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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 1}])
def test_the_step_gives_the_logits_of_transformers(tmp_path: Path, changes: dict[str, object], in_place: bool) -> None:
    policy = load(str(save_tiny_model(tmp_path, **changes)), device="cpu", precision="float32")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        theirs, ours = both(policy, torch.float32, in_place=in_place)
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 1}])
def test_a_packed_row_gives_the_gradients_of_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
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
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    assert fits(Qwen2(Qwen2Config(vocab_size=8, **shape)))
    assert not fits(Qwen2(Qwen2Config(vocab_size=8, rope_parameters=yarn, **shape)))
    assert not fits(LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape)))


def test_other_architectures_are_sampled_by_their_own_forward_pass(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=832, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=48, initializer_range=0.25, bos_token_id=None, eos_token_id=5, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(str(tiny_folder)).save_pretrained(tmp_path)
    policy = load(str(tmp_path), device="cpu", precision="float32")
    prompts = [list(range(10, 30)), list(range(40, 50))]
    found = sample(policy, prompts, SamplingParams(24), uniform=None)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=list(policy.end_ids), pad_token_id=0)
    for tokens, completion in zip(prompts, found.completions, strict=True):
        assert (
            peer.generate(torch.tensor([tokens]), generation_config=settings)[0, len(tokens) :].tolist() == completion
        )


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
