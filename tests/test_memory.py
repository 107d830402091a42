"""The memory plan: its sizes are what real passes take, and it chooses what fits."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import SMALL, Command, save_tiny_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
)

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import resident
from grpo_cli.core.model.load import load
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.perf import memory
from grpo_cli.core.perf.memory import GB, Choices, Planner, Work, find, moment_bytes, room
from grpo_cli.core.rl.update import reference_logprobs

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"kind": LlamaConfig},
    "llama by its own forward": {"kind": LlamaConfig, "rope_parameters": YARN},
    "normed heads": {"kind": Qwen3Config, "head_dim": 8},
    "normed heads wider than the model": {"kind": Qwen3Config, "head_dim": 24},
}

WORK = Work("cuda", "bf16-master", "adamw8bit", 4, 16, 290, 160, 64, has_reference=True)  # the original's
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936,
    "tie_word_embeddings": True, "rope_theta": 1e6, "max_position_embeddings": 32768,
}  # fmt: skip
WEIGHTS = 1_543_714_304
SMOL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
    "vocab_size": 49152, "tie_word_embeddings": True, "layer_types": ["full_attention"] * 30,
}  # fmt: skip


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Qwen2.5-1.5B without its weights: the config and some tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    for path in tiny_folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(QWEN))
    return folder


@pytest.fixture(scope="session")
def planner(qwen: Path) -> Planner:
    return Planner(str(qwen), WORK, PackedPath())


# Precision, gradient checkpointing, prompts, completions of each, tokens of both, and the width of the MLP.
PASSES = [
    ("float32", False, (2, 4, 20, 60), 48),
    ("float32", True, (1, 8, 60, 40), 256),
    ("bf16-master", False, (4, 2, 12, 30), 128),
    ("bf16-master", True, (2, 4, 20, 60), 48),
]


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize(("precision", "checkpointing", "shape", "width"), PASSES)
def test_activations_are_about_what_a_real_pass_saves(
    tmp_path: Path, precision: str, checkpointing: bool, architecture: str, shape: tuple[int, int, int, int], width: int
) -> None:
    prompts, generations, prompt_tokens, new_tokens = shape
    folder = save_tiny_model(tmp_path / "model", num_hidden_layers=4, intermediate_size=width, **KINDS[architecture])
    work = Work("cpu", precision, "adamw", prompts, generations, prompt_tokens, new_tokens, 8, has_reference=False)
    planned = Planner(str(folder), work).plan(Choices(checkpointing=checkpointing)).phases["update"]
    policy = load(str(folder), device="cpu", precision=precision, gradient_checkpointing=checkpointing)
    rows = prompts * generations
    index = [row // generations for row in range(rows)]
    saved = saved_bytes(policy, Sequences([[1] * prompt_tokens] * prompts, [[2] * new_tokens] * rows, index))
    covered = planned["activations"] + planned["logits"] + planned["working room"]
    assert saved <= covered, (saved, planned)
    assert planned["activations"] <= 3 * saved, (saved, planned)


@pytest.mark.parametrize("kind", ["mistral", "bloom"])
def test_the_plain_path_is_planned_without_shared_prompts_and_chunks(tmp_path: Path, kind: str) -> None:
    folder = save_tiny_model(tmp_path / "model")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    if kind == "mistral":
        shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2}
        model: PreTrainedModel = MistralForCausalLM(
            MistralConfig(vocab_size=vocabulary, intermediate_size=64, sliding_window=4, **shape)
        )
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=4, n_head=4))
    model.save_pretrained(folder)
    work = Work("cpu", "float32", "adamw", 2, 4, 60, 20, 8, has_reference=False)
    planner = Planner(str(folder), work)
    assert planner.plain and find(planner, room=10 * int(GB)).choices.logit_chunk == 0
    planned = planner.plan(Choices()).phases["update"]
    policy = load(str(folder), device="cpu", precision="float32")
    saved = saved_bytes(policy, Sequences([[1] * 60] * 2, [[2] * 20] * 8, [0] * 4 + [1] * 4))
    assert saved <= planned["activations"] + planned["logits"]
    with pytest.raises(CountdownError, match="this training needs at least"):
        find(planner, room=10**7)


def test_logits_of_the_models_own_forward_are_planned_at_once(planner: Planner, qwen: Path) -> None:
    room = next(size for size in range(10**10, 10**12, 10**9) if size > planner.plan(Choices(logit_chunk=1024)).peak)
    assert find(planner, room=room, rows=WORK.rows, checkpointing=False).choices.logit_chunk > 0
    with pytest.raises(CountdownError, match="this training needs at least"):
        find(Planner(str(qwen), WORK, PackedPath(own_logits=True)), room=room, rows=WORK.rows, checkpointing=False)


def saved_bytes(policy: Policy, sequences: Sequences) -> int:
    """Bytes of the storages that a pass saves for its backward, the model's own aside."""
    known = {weight.untyped_storage().data_ptr() for weight in policy.model.parameters()}
    kept = dict[int, Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.logprobs(sequences, temperature=1.0)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_cpu_is_planned_by_what_the_process_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's shape, 8 x 8 completions of 260 tokens, micro-batches of 32: 19.75 GB were planned once."""
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | SMOL
    (folder / "config.json").write_text(json.dumps(config))
    work = Work("cpu", "bf16-master", "adamw", 8, 8, 140, 260, 64, has_reference=False)
    planner = Planner(str(folder), work)
    held = resident()
    assert held > 10**8
    assert planner.plan(Choices(rows=32)).peak > 22e9
    for phase in planner.plan(Choices(rows=32)).phases.values():
        assert phase["process"] >= held
    found = find(planner, room=int(8 * GB))
    assert found.peak <= found.limit == 8 * GB and found.choices.rows <= 16
    monkeypatch.setattr(memory, "free_memory", lambda device: int(10 * GB))
    settings = resolve(has_cuda=lambda: False).settings
    assert room(settings, work) == pytest.approx(7 * GB + resident(), rel=0.01)
    assert room(settings, replace(work, ranks=2)) == pytest.approx(3.5 * GB + resident(), rel=0.01)
    assert room(settings, replace(work, device="cuda")) == int(9.5 * GB) - 500_000_000
    assert room(settings, replace(work, device="cuda", ranks=2)) == int(9.5 * GB) - 1_500_000_000  # NCCL's buffers


def test_moments_take_what_the_optimizers_keep() -> None:
    shapes = [(64, 64), (63, 65), (300, 100), (7,)]
    for name, build in (("adamw8bit", bitsandbytes.optim.AdamW8bit), ("adamw", torch.optim.AdamW)):
        for dtype in (torch.float32, torch.bfloat16):
            weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
            optimizer = build(weights)
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
            kept = [
                value
                for state in optimizer.state.values()
                for key, value in state.items()
                if isinstance(value, Tensor) and key != "step" and not key.startswith("qmap")
            ]
            expected = moment_bytes([weight.shape for weight in weights], dtype, name)
            assert sum(value.nbytes for value in kept) == expected, (name, dtype)


def test_static_parts_of_qwen_are_those_worked_out_by_hand(planner: Planner) -> None:
    stays = planner.plan(Choices()).phases["optimizer"]
    assert planner.count == WEIGHTS
    assert stays["weights"] == stays["reference"] == stays["gradients"] == 2 * WEIGHTS
    assert stays["master"] == 4 * WEIGHTS
    # 28 layers, keys and values, 2 heads of 128, 2 bytes; prompts padded to 320 tokens.
    token = 28 * 2 * 2 * 128 * 2
    assert stays["KV cache"] == token * (4 * 320 + 64 * 160 + 64 * 320 + 64 * 160)
    # Logits in 16 bits, float32 and float64; of two recorded steps the activations, scores and cuBLAS's workspaces.
    of_row = 151936 * 18 + 2 * (4 * 1536 + 3 * 8960 + 2 * 1536) + 12 * 12 * (320 + 160)
    assert stays["sampling"] == 2 * 64 * of_row + 2 * 2**25
    assert stays["working room"] == 4 * 151936 * 1536  # the embedding's gradient in float32
    norms_and_biases = 28 * (1536 + 256 + 256 + 2 * 1536) + 1536
    blocked = WEIGHTS - norms_and_biases
    assert stays["moments"] == 8 * norms_and_biases + 2 * blocked + 8 * blocked // 256
    # Of the whole step, twice in float32 and once in bfloat16.
    assert planner.plan(Choices()).phases["update"]["logits"] == 64 * 160 * 151936 * (4 + 4 + 2)


def test_fused_kernels_keep_the_logits_and_their_gradient_alone(qwen: Path, planner: Planner) -> None:
    fused = Planner(str(qwen), WORK)  # by default on CUDA
    assert fused.plan(Choices()).phases["update"]["logits"] == 64 * 160 * 151936 * (2 + 2)
    assert find(fused, room=int(26 * GB)).choices.rows == 32 == 2 * find(planner, room=int(26 * GB)).choices.rows


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (141, Choices()),
        (40, Choices(rows=16)),
        (26, Choices(rows=16, checkpointing=True)),
        (24, Choices(logit_chunk=1024, rows=32, checkpointing=True)),
        (22, Choices(rows=16, checkpointing=True, on_host=True)),
    ],
)
def test_the_cheapest_choices_that_fit_are_taken(planner: Planner, gigabytes: int, expected: Choices) -> None:
    found = find(planner, room=int(gigabytes * GB))
    assert found.choices == expected
    assert found.peak <= found.room == gigabytes * GB and found.limit == 0


SHARDED = replace(WORK, optimizer="adamw", ranks=8, shards=8)
LAYER = 2 * 1536 * 1536 + 1536 + 2 * (1536 * 256 + 256) + 3 * 1536 * 8960 + 2 * 1536
ENDS = 151936 * 1536 + 1536


@pytest.fixture(scope="session")
def eighth(qwen: Path) -> Planner:
    return Planner(str(qwen), SHARDED, PackedPath())


def test_parts_of_eight_shards_are_those_worked_out_by_hand(eighth: Planner) -> None:
    phases = eighth.plan(Choices(rows=4)).phases
    assert phases["rollout"]["weights"] == 2 * WEIGHTS
    assert phases["update"]["master"] == phases["update"]["reference"] == phases["update"]["gradients"]
    assert phases["update"]["gradients"] == WEIGHTS // 2  # four bytes, an eighth of them
    assert phases["update"]["moments"] == WEIGHTS
    # The ends and two layers in bfloat16; gradients of the ends and of a layer in bfloat16, and again in float32.
    assert phases["reference"]["working room"] == 2 * (ENDS + 2 * LAYER)
    assert phases["update"]["working room"] == 2 * (ENDS + 2 * LAYER) + 6 * (ENDS + LAYER)
    assert phases["optimizer"]["working room"] == 4 * 151936 * 1536  # the embedding whole, to be copied


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (24, Choices(rows=32, checkpointing=True)),
        (15, Choices(rows=8, checkpointing=True)),
    ],
)
def test_what_is_refused_whole_is_taken_in_shards(
    planner: Planner, eighth: Planner, gigabytes: int, expected: Choices
) -> None:
    found = find(eighth, room=int(gigabytes * GB))
    assert found.choices == expected and found.peak <= found.room
    if gigabytes < 16:
        with pytest.raises(CountdownError):
            find(planner, room=int(gigabytes * GB))


def test_a_plan_leaves_sampling_to_vllm(qwen: Path, planner: Planner, eighth: Planner) -> None:
    def without(work: Work) -> memory.MemoryPlan:
        return Planner(str(qwen), replace(work, decodes=False), PackedPath()).plan(Choices())

    own, left = planner.plan(Choices()).phases["rollout"], without(WORK).phases["rollout"]
    assert {"KV cache", "sampling"} <= own.keys() and not {"KV cache", "sampling"} & left.keys()
    assert left["activations"] == 0 < own["activations"] and left["weights"] == own["weights"] > 0
    # The gathered copy of sharded weights is for decoding; their shards are in float32.
    assert eighth.plan(Choices()).phases["update"]["weights"] == 2 * WEIGHTS
    sharded = without(eighth.work).phases["update"]
    assert sharded["weights"] == 0 and sharded["master"] == 4 * WEIGHTS / 8


@pytest.mark.parametrize(("url", "share"), [("none", 0.3), ("http://localhost:8000", 0.0)])
def test_vllm_in_the_same_process_has_its_share_of_the_budget(url: str, share: float) -> None:
    flags = {"model.rollout": "vllm", "model.vllm_memory": 0.3, "model.vllm_url": url, "model.memory": 80.0}
    settings = resolve(flags=flags).settings
    local, remote = (room(settings, replace(WORK, decodes=decodes)) for decodes in (True, False))
    assert local - remote == pytest.approx(share * 80 * GB, abs=2)


def test_what_is_set_is_not_chosen(planner: Planner) -> None:
    found = find(planner, room=int(40 * GB), rows=8, checkpointing=True, on_host=True)
    assert found.choices == Choices(0, 8, checkpointing=True, on_host=True)
    with pytest.raises(CountdownError, match=r"needs at least \d\d\.\d GB of memory, and 24\.0 GB") as caught:
        find(planner, room=int(24 * GB), rows=64, checkpointing=False, on_host=False)
    assert caught.value.exit_code == 2 and "--max-new-tokens" in str(caught.value.hint)


def test_a_reference_on_the_host_is_brought_for_its_pass_and_no_longer(tiny_policy: Policy) -> None:
    sequences = Sequences([[1] * 4] * 2, [[2] * 3] * 4, [0, 0, 1, 1])
    expected = reference_logprobs(Reference.of(tiny_policy), sequences, temperature=1.0)
    reference = Reference.of(tiny_policy, on_host=True)
    home = [weight.data_ptr() for weight in reference.policy.model.parameters()]
    assert reference.policy.fingerprint() == tiny_policy.fingerprint()
    with reference.on_device():
        away = [weight.data_ptr() for weight in reference.policy.model.parameters()]
        assert not set(away) & set(home)
    assert torch.equal(reference_logprobs(reference, sequences, temperature=1.0), expected)
    assert [weight.data_ptr() for weight in reference.policy.model.parameters()] == home
    with pytest.raises(RuntimeError, match="halfway"), reference.on_device():
        raise RuntimeError("halfway")
    assert [weight.data_ptr() for weight in reference.policy.model.parameters()] == home


def test_a_dry_run_plans_for_a_gpu_that_is_not_there(countdown: Command, qwen: Path) -> None:
    arguments = ["train", "--preset", "qwen2.5-1.5b", "--model", qwen, "--device", "cuda", "--dry-run", "-v"]
    found = countdown(*arguments, "--precision", "bf16-master", "--memory", "24")
    assert found.code == 0, found.err
    assert "22.30 GB can be used" in " ".join(found.out.split())
    for word in ("weights", "master", "gradients", "moments", "reference", "KV cache", "activations", "logits"):
        assert f"\n{word} " in found.out
    assert "gradient checkpointing on" in " ".join(found.out.split())
    assert countdown(*arguments, "--memory", "8").code == 2
    found = countdown(*arguments)
    assert found.code == 2 and "device `cuda` is not available" in found.err


def test_a_training_does_as_planned_and_says_so(countdown: Command, tiny_folder: Path) -> None:
    found = countdown("train", "--model", tiny_folder, "--run", "plain", *SMALL)
    assert found.code == 0
    assert "micro-batches of the whole step, gradient checkpointing off, reference on the device" in found.err
    changed = ["--gradient-checkpointing", "on", "--reference", "host", "--micro-batch-size", "1"]
    found = countdown("train", "--model", tiny_folder, "--run", "lean", *SMALL, *changed)
    assert found.code == 0
    assert "micro-batches of 1 completion, gradient checkpointing on, reference on the host" in found.err
    plain, lean = (
        [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "lean")
    )
    for one, other in zip(plain, lean, strict=True):
        for key in ("loss", "kl", "grad_norm", "reward"):
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3, abs=1e-5)


def test_what_cannot_fit_is_refused_before_anything_is_loaded(countdown: Command, tiny_folder: Path) -> None:
    found = countdown("train", "--model", tiny_folder, "--run", "large", *SMALL, "--memory", "0.0001")
    assert found.code == 2
    assert "this training needs at least" in found.err and "hint:" in found.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("expandable_segments:True", None)),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ("backend:native", None)),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, (None, "backend:native")),
    ],
)
def test_the_allocator_of_cuda_grows_its_blocks_unless_the_user_says_how(
    countdown: Command, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: tuple[str | None, str | None]
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
        if name in given:
            monkeypatch.setenv(name, given[name])
    assert countdown("--version").code == 0
    assert (os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), os.environ.get("PYTORCH_ALLOC_CONF")) == expected
