"""The static sampler: what it samples, that its step can be recorded, and that it lasts while the weights change."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model
from test_rollout import encoded, with_frequent_end
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

from grpo_cli.core.model import attention, llama
from grpo_cli.core.model.attention import GROUP, WORTH, num_shared
from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rollout import decode as sampler_module
from grpo_cli.core.rollout.decode import BLOCK, KEPT, ROUNDED, StaticSampler, _inverse_cdf
from grpo_cli.core.rollout.engine import Rollout, uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams

aten = torch.ops.aten
Kept = dict[SamplingParams, StaticSampler]
# What looks at numbers on the host, or makes tensors of a size that depends on numbers.
UNRECORDABLE = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2, aten.equal}


class Recording(TorchDispatchMode):
    """What a CUDA graph does: note every kernel with its tensors and numbers, then do just these again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[tuple[Any, Any, Any, list[Tensor | None]]] = []

    def __torch_dispatch__(
        self, kernel: Any, types: Sequence[type], arguments: Any = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        by_booleans = kernel.overloadpacket is aten.index and any(
            part.dtype == torch.bool for part in arguments[1] if part is not None
        )
        assert kernel.overloadpacket not in UNRECORDABLE and not by_booleans, f"{kernel} cannot be recorded"
        found = kernel(*arguments, **(options or {}))
        places = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        taken = {place.untyped_storage().data_ptr() for place in places}
        made = [new if new.untyped_storage().data_ptr() not in taken else None for new in tree_leaves(found)]
        self.kernels.append((kernel, arguments, options or {}, made))
        return found

    def replay(self) -> None:
        for kernel, arguments, options, made in self.kernels:
            for place, value in zip(made, tree_leaves(kernel(*arguments, **options)), strict=True):
                if place is not None:
                    place.copy_(value)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Steps are recorded and replayed as on CUDA; returns the recordings made so far."""
    made: list[Recording] = []

    def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        work()  # to warm up, as there
        recording = Recording()
        with recording:
            work()
        made.append(recording)
        return recording.replay

    monkeypatch.setattr(sampler_module, "record", record)
    return made


def rolled(
    policy: Policy, prompts: list[list[int]], *, static: bool, step: int = 0, generations: int = 8, tokens: int = 48,
    temperature: float = 1.3, kept: Kept | None = None,
) -> Rollout:  # fmt: skip
    """Sampled completions, or one greedy one of each prompt at temperature 0."""
    uniform = uniforms(1, step, range(len(prompts)), generations, tokens) if temperature else None
    engine = LocalEngine(policy, {} if kept is None else kept, static)
    return engine.sample(
        prompts, SamplingParams(tokens, temperature, generations if temperature else 1), uniform=uniform
    )


def assert_same(found: Rollout, expected: Rollout, *, atol: float = 2e-5) -> None:
    assert found.completions == expected.completions
    assert found.truncated == expected.truncated
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=atol, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("tokens", [1, 2, 48])
def test_a_replayed_step_samples_what_the_shrinking_sampler_does(
    tiny_policy: Policy, recorded: list[Recording], temperature: float, tokens: int
) -> None:
    policy = with_frequent_end(tiny_policy)
    prompts = encoded(policy)
    expected = rolled(policy, prompts, static=False, temperature=temperature, tokens=tokens)
    found = rolled(policy, prompts, static=True, temperature=temperature, tokens=tokens)
    assert_same(found, expected)
    assert len(recorded) == (tokens > 1)
    assert tokens < 48 or len({len(completion) for completion in found.completions}) > 2


def test_one_recording_serves_every_batch_of_its_form(tiny_policy: Policy, recorded: list[Recording]) -> None:
    policy = with_frequent_end(tiny_policy)
    prompts, kept = encoded(policy), Kept()
    for step, chosen in enumerate([prompts, prompts[::-1], prompts[:1], [prompts[0], prompts[2]]]):
        expected = rolled(policy, chosen, static=False, step=step)
        assert_same(rolled(policy, chosen, static=True, step=step, kept=kept), expected)
    assert len(recorded) == len(kept) == 1
    assert all(sampler.shape[1] % ROUNDED == 0 for sampler in kept.values())


def test_a_recording_follows_weights_that_are_updated_where_they_lie(
    tiny_policy: Policy, recorded: list[Recording]
) -> None:
    policy = with_frequent_end(tiny_policy)
    prompts, kept = encoded(policy), Kept()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.02)
    before = rolled(policy, prompts, static=True, kept=kept)
    for _ in range(2):
        sequences = Sequences(prompts, before.completions, [row // 8 for row in range(24)])
        logprobs, _ = policy.logprobs(sequences, temperature=1.3)
        logprobs.sum().backward()
        optimizer.step()
        found = rolled(policy, prompts, static=True, kept=kept)
        assert_same(found, rolled(policy, prompts, static=False))
        assert found.completions != before.completions
        before = found
    assert len(recorded) == 1


def test_a_form_of_its_own_for_other_settings_and_the_oldest_is_dropped(
    tiny_policy: Policy, recorded: list[Recording]
) -> None:
    prompts, kept = encoded(tiny_policy), Kept()
    for count, settings in enumerate([{"generations": 2}, {"generations": 3}, {"tokens": 9}, {"temperature": 0.7}], 1):
        rolled(tiny_policy, prompts, static=True, kept=kept, **settings)  # type: ignore[arg-type]
        assert len(recorded) == count
        assert len(kept) == min(count, KEPT)


def test_a_batch_that_memory_has_no_room_for_is_done_in_halves_in_new_tensors(tiny_policy: Policy) -> None:
    def run_out() -> None:
        raise MemoryError

    policy = with_frequent_end(tiny_policy)
    prompts, kept = encoded(policy), Kept()
    expected = rolled(policy, prompts, static=True, kept=kept)
    (before,) = kept.values()
    before.replay = run_out
    assert_same(rolled(policy, prompts, static=True, kept=kept), expected)
    assert before not in kept.values() and {one.shape[0] for one in kept.values()} == {1}


@pytest.mark.parametrize("precision", ["bf16", "bf16-master"])
def test_static_log_probabilities_are_the_trainers_in_bfloat16_too(tiny_folder: Any, precision: str) -> None:
    policy = load(str(tiny_folder), device="cpu", precision=precision)
    prompts = encoded(policy)
    found = rolled(policy, prompts, static=True, tokens=24)
    exact = load(str(tiny_folder), device="cpu", precision="float32")
    sequences = Sequences(prompts, found.completions, [row // 8 for row in range(24)])
    logprobs, _ = exact.logprobs(sequences, temperature=1.3)
    sampled = torch.tensor([value for row in found.logprobs for value in row])
    assert (logprobs[sequences.mask()] - sampled).abs().mean() < 0.1


def test_what_is_streamed_is_what_is_sampled(tiny_policy: Policy) -> None:
    policy = with_frequent_end(tiny_policy)
    prompt = encoded(policy)[1]
    expected = rolled(policy, [prompt], static=False, temperature=0.0)
    for static in (False, True):
        text = "".join(LocalEngine(policy, static=static).stream(prompt, SamplingParams(48), uniform=None))
        assert text == policy.decode(expected.completions[0])


def test_longer_prompts_replace_the_sampler_of_their_own_kind(tiny_policy: Policy, recorded: list[Recording]) -> None:
    """An evaluation whose prompts cross a multiple of ROUNDED leaves the training's recording alone."""
    short, longer = [list(range(10, 10 + length)) for length in (ROUNDED - 2, ROUNDED + 2)]
    kept = Kept()
    rolled(tiny_policy, [short], static=True, kept=kept)
    (training,) = kept.values()
    for prompt in (short, longer):
        rolled(tiny_policy, [prompt], static=True, kept=kept, temperature=0.0)
    rolled(tiny_policy, [short], static=True, kept=kept, temperature=0.0, tokens=9)  # an evaluation of another kind
    assert len(kept) == KEPT and training in kept.values()


def with_qwens_biases(folder: Path) -> Path:
    """A model whose attention scores are in the hundreds, as in the first layers of Qwen2.5."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder, hidden_size=128))
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection, deviation in ((layer.self_attn.k_proj, 30), (layer.self_attn.q_proj, 8)):
                projection.bias.copy_(deviation * torch.randn(projection.bias.shape, generator=rng))
                projection.weight.mul_(0.01)  # what bfloat16 rounds away in them is not the scores' fault
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend in the type of the model, which a CPU does not."""
    for module in (attention, llama):
        monkeypatch.setattr(module, "attention_dtype", lambda device, dtype: dtype)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(("repeats", "generations"), [(1, 32), (11, GROUP - 1)], ids=["own keys", "shared keys"])
def test_scores_in_the_hundreds_decode_in_bfloat16_as_in_float32_and_as_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeats: int, generations: int
) -> None:
    policy = load(str(with_qwens_biases(tmp_path)), device="cpu", precision="bf16")
    prompts = encoded(policy) * repeats
    assert num_shared(prompts) >= WORTH
    found = rolled(policy, prompts, static=False, generations=generations, tokens=2)
    sequences = Sequences(prompts, found.completions, [row // generations for row in range(len(found.completions))])
    trained = policy.logprobs(sequences, temperature=1.3)[0]
    decoded: Callable[..., Tensor] = attention._decoded

    def as_float32(leaf: object) -> object:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def in_float32(*tensors: Any) -> Tensor:
        return decoded(*tree_map(as_float32, tensors)).bfloat16()

    monkeypatch.setattr(attention, "_decoded", in_float32)
    exact = rolled(policy, prompts, static=False, generations=generations, tokens=2)
    assert {len(row) for row in (*found.completions, *exact.completions)} == {2}
    second, other = (torch.tensor(one.logprobs)[:, 1] for one in (found, exact))
    same = [ours == theirs for ours, theirs in zip(found.completions, exact.completions, strict=True)]
    differences = (second - other)[same].abs()
    assert sum(same) > 40
    assert differences.max() < 0.15 and differences.mean() < 0.03  # 0.39 and 0.046 with scores rounded to bfloat16
    assert (second - trained[:, 1]).abs().mean() < 0.1


@pytest.mark.parametrize("vocabulary", [832, 8192, 10_000, 49_152])
def test_no_token_of_probability_zero_is_drawn_at_the_edge_of_a_block(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(vocabulary, generator=generator) ** 8  # of very different sizes, most of them 0
    probabilities *= torch.rand(vocabulary, generator=generator) < 0.02
    probabilities /= probabilities.sum()
    blocks = torch.nn.functional.pad(probabilities, (0, -vocabulary % BLOCK)).view(-1, BLOCK)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=0)
    edges = torch.cat([torch.zeros(1), ends / ends[-1]])
    largest = torch.tensor(1 - 2**-53, dtype=torch.float64)
    uniform = torch.cat([edges, torch.nextafter(edges, -largest), torch.nextafter(edges, 2 * largest)])
    uniform = uniform.clamp(min=0).minimum(largest)
    tokens = _inverse_cdf(probabilities.expand(len(uniform), -1), uniform)
    assert bool((probabilities[tokens] > 0).all())
