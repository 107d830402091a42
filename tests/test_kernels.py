"""The Triton kernels against the plain code that they replace: on CUDA, or else in Triton's interpreter."""

from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_decode import assert_same, rolled
from test_policy import gradients
from torch import Tensor
from torch.nn.functional import silu

from grpo_cli.core.model.attention import Prefill, StaticDecode
from grpo_cli.core.model.llama import _turn
from grpo_cli.core.model.load import load
from grpo_cli.core.model.logprobs import token_logprobs
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.policy import Sequences

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter of Triton 3.6, which torch 2.11 brings, fails with numpy 2.4; on a GPU it is not needed.
RUNS = find_spec("triton") and (CUDA or not version("triton").startswith("3.6"))
pytestmark = [pytest.mark.skipif(not RUNS, reason="needs Triton"), *([pytest.mark.gpu] if CUDA else [])]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return import_module("grpo_cli.core.model.kernels")


HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies the bit patterns of bfloat16 matrices

# Prompt lengths, completions of each, slots to decode, query heads, key-value heads, head dimension, dtype, bias.
SHAPES = {
    "qwen2.5-1.5b's heads": ([70, 9], 1, [5], 12, 2, 128, HALF, 1.0),
    "as many key-value heads as query heads": ([5, 1], 2, [1], 2, 2, 16, torch.float32, 1.0),
    "one key-value head": ([6], 2, [2], 7, 1, 64, torch.float32, 1.0),
    "a head narrower than a product takes": ([4, 3], 1, [1], 4, 2, 8, torch.float32, 1.0),
    "a width that is no power of two": ([4, 3], 1, [3], 4, 2, 24, HALF, 1.0),
    "several blocks of prompt and of completion": ([130, 64], 1, [64, 130], 2, 1, 16, torch.float32, 1.0),
    "scores in the hundreds": ([70, 33], 1, [7], 4, 2, 64, HALF, 30.0),
    "one row": ([12], 1, [0, 1], 4, 2, 16, torch.float32, 1.0),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_attention_is_plain_attention(kernels: ModuleType, shape: tuple) -> None:  # type: ignore[type-arg]
    prompts, generations, slots, queries, heads, width, dtype, bias = shape
    rng = torch.Generator().manual_seed(sum(prompts) + queries)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=rng).to(DEVICE)

    plain, fused = (
        StaticDecode(
            1,
            (len(prompts), heads, generations, max(slots) + 2, width),
            longest=max(prompts) + 3,
            dtype=dtype,
            device=DEVICE,
        )
        for _ in range(2)
    )
    key_bias = bias * random(heads, 1, width)
    prefill = Prefill()
    prefill.keys = [(random(len(prompts), heads, max(prompts), width) + key_bias).to(dtype)]
    prefill.values = [random(*prefill.keys[0].shape).to(dtype)]
    own = [(random(*plain.own_keys[0].shape) + part).to(dtype) for part in (key_bias[:, None], 0)]
    for plan in (plain, fused):
        plan.fill(prefill, torch.tensor(prompts, device=DEVICE))
        plan.own_keys[0].copy_(own[0])
        plan.own_values[0].copy_(own[1])
    biases = torch.cat([bias / 4 * random(queries, width), key_bias[:, 0], torch.zeros(heads, width, device=DEVICE)])
    for slot in slots:
        for plan in (plain, fused):
            plan.absent[..., -max(slots) - 2 :] = torch.arange(max(slots) + 2, device=DEVICE) >= slot
            plan.open(torch.tensor([slot], device=DEVICE))
        rows = len(prompts) * generations
        qkv = (random(rows, queries + 2 * heads, width) + biases).to(dtype)
        angles = 6 * random(rows, 1, width // 2)
        cosines, sines = torch.cat([angles.cos(), angles.cos()], dim=-1).to(dtype), angles.sin().to(dtype)
        turned = _turn(qkv[:, : queries + heads].float(), cosines.float(), sines.float()).to(dtype)
        parts = [part[:, :, None] for part in turned.split([queries, heads], dim=1)]
        expected = plain.attend(0, parts[0], parts[1], qkv[:, queries + heads :, None], width**-0.5)[:, 0]
        found = fused.attend_fused(0, qkv, cosines, sines, width**-0.5)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
        assert (
            bias == 1.0 or (parts[0].float().norm(dim=-1).max() * own[0].float().norm(dim=-1).max()) > 100 * width**0.5
        )
    for ours, theirs in ((fused.own_keys, plain.own_keys), (fused.own_values, plain.own_values)):
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 5000), (3, 4096), (1, 7), (0, 9)])
def test_log_probabilities_and_their_gradients(
    kernels: ModuleType, rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(rows)
    logits = (12 * torch.randn(rows, vocabulary, generator=rng)).to(DEVICE, dtype)
    logits[:1, vocabulary // 2 :] = float("-inf")  # tokens that cannot come
    targets = torch.randint(0, vocabulary // 2, (rows,), generator=rng).to(DEVICE)
    weights = torch.randn(rows, generator=rng).to(DEVICE)
    found = []
    for compute in (token_logprobs, lambda *asked: kernels.token_logprobs(*asked, entropy=True)):
        given = logits.clone().requires_grad_()
        logprobs, entropy = compute(given, targets, 1.3)
        (logprobs * weights).sum().backward()
        assert given.grad is not None and not entropy.requires_grad
        found.append((logprobs.detach(), entropy.nan_to_num(), given.grad))
    assert torch.equal(logits.isinf(), torch.isinf(given.detach()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours[1:], theirs[1:], atol=2e-5, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-5)
        assert torch.isfinite(ours).all()
    assert not kernels.token_logprobs(logits, targets, 1.3, entropy=False)[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradients(kernels: ModuleType, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(2)
    joined = (3 * torch.randn(5, 2 * 1100, generator=rng)).to(DEVICE, dtype)
    gradient = torch.randn(5, 1100, generator=rng).to(DEVICE, dtype)
    results: list[tuple[Tensor, ...]] = []
    for compute in (lambda gate, up: (silu(gate.float()) * up.float()).to(dtype), kernels.swiglu):
        gate_up = joined.clone().requires_grad_()
        out = compute(*gate_up.chunk(2, dim=-1))
        out.backward(gradient)
        assert gate_up.grad is not None
        results.append((out.detach(), gate_up.grad))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fused_policy_gives_the_log_probabilities_and_gradients_of_the_plain_one(
    kernels: ModuleType, tiny_folder: Path, checkpointing: bool
) -> None:
    policy = load(str(tiny_folder), device=DEVICE.type, precision="float32", gradient_checkpointing=checkpointing)
    sequences = Sequences([[5, 9, 200], [7, 8]], [[11, 12], [13], [14, 15, 16]], [0, 0, 1])
    found = []
    for fused in (False, True):
        chosen = replace(policy, path=PackedPath(fused=fused))
        logprobs, entropy = chosen.logprobs(sequences, temperature=1.3)
        found.append([logprobs.detach(), entropy, *gradients(policy.model, logprobs).values()])
        with torch.no_grad():
            again, _ = chosen.logprobs(sequences, temperature=1.3, entropy="none")
        torch.testing.assert_close(again, logprobs.detach(), atol=1e-5, rtol=0)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=2e-5)


def test_a_fused_policy_samples_what_the_plain_one_does(kernels: ModuleType, tiny_folder: Path) -> None:
    policy = replace(load(str(tiny_folder), device=DEVICE.type, precision="float32"), path=PackedPath(fused=True))
    prompts = [[5, 9, 200], [7, 8]]
    expected = rolled(policy, prompts, static=False, generations=1, tokens=3)
    assert_same(rolled(policy, prompts, static=True, generations=1, tokens=3), expected)
