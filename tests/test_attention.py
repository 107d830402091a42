"""Who attends to whom: index lists worked out by hand, and each plan against plain attention under a dense mask."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from grpo_cli.core.model import attention
from grpo_cli.core.model.attention import BUCKET, GROUP, WORTH, Decode, Packed, Prefill, num_shared, order

HEADS, KEY_HEADS, WIDTH, SCALING = 4, 2, 8, 0.37
CPU = torch.device("cpu")


def random_layer(rng: torch.Generator, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, d), keys and values (B, K, T, d)."""
    query = torch.randn(batch, HEADS, tokens, WIDTH, generator=rng)
    key, value = torch.randn(2, batch, KEY_HEADS, tokens, WIDTH, generator=rng)
    return query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Attention (T, H, d) of one row, written out: softmax over the keys that `allowed` (T, S) admits."""
    attended = torch.empty(query.shape[1], HEADS, WIDTH)
    for head in range(HEADS):
        of_head = head // (HEADS // KEY_HEADS)
        scores = (query[head] @ key[of_head].T * SCALING).masked_fill(~allowed, float("-inf"))
        attended[:, head] = scores.softmax(dim=-1) @ value[of_head]
    return attended


def test_packed_positions_restart_after_the_prompt_of_each_completion() -> None:
    plan = Packed([3, 2], [2, 1], [0, 1], CPU)
    assert plan.positions.tolist() == [[0, 1, 2, 0, 1, 3, 4, 2]]
    plan = Packed([3, 2], [2, 1], [0, 1], CPU, shared=1)
    assert plan.positions.tolist() == [[0, 1, 2, 1, 3, 4, 2]]


def test_prompts_share_their_first_tokens_but_not_all_and_not_a_few() -> None:
    alike = list(range(WORTH + 2))
    assert num_shared([alike, [*alike[:-1], 0], alike]) == WORTH + 1
    assert num_shared([alike, alike]) == WORTH + 1
    assert num_shared([alike, alike[:-1]]) == WORTH
    assert num_shared([alike, alike[:-2]]) == 0
    assert num_shared([alike]) == 0
    assert num_shared([alike, [1, *alike[1:]]]) == 0


def test_a_first_token_is_predicted_by_the_last_token_of_its_prompt() -> None:
    plan = Packed([3, 2], [2, 1], [0, 1], CPU)
    assert plan.predecessors.tolist() == [2, 5, 4]
    crossed = Packed([3, 2], [1, 3, 2], [1, 0, 1], CPU)  # [p1: 0-2 | p2: 3-4 | c1: 5 | c2: 6-8 | c3: 9-10]
    assert crossed.predecessors.tolist() == [4, 2, 6, 7, 4, 9]
    assert crossed.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 2, 3]]
    shared = Packed([3, 2], [1, 3, 2], [1, 0, 1], CPU, shared=1)  # [s: 0 | p1: 1-2 | p2: 3 | c1: 4 | c2: 5-7 | c3: 8-9]
    assert shared.predecessors.tolist() == [3, 2, 5, 6, 3, 8]


@pytest.fixture(params=[False, True], ids=["masked", "maskless"])
def without_mask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as a CPU does it, and as CUDA does, whose flash kernels take no mask."""
    monkeypatch.setattr(attention, "maskless", lambda device: request.param)


@pytest.fixture(params=[1, 2, HEADS], ids=["one key head", "grouped", "as many key heads"])
def key_heads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "KEY_HEADS", request.param)


@pytest.mark.usefixtures("without_mask", "key_heads")
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("rows", [1, BUCKET, BUCKET + 1, 3 * BUCKET - 5])
def test_packed_attention_is_that_of_each_prompt_and_completion_on_its_own(rows: int, shared: int) -> None:
    rng = torch.Generator().manual_seed(rows)
    prompts = [5, 3, 9]
    lengths = torch.randint(1, 12, (rows,), generator=rng).tolist()
    prompt_index = torch.randint(0, 3, (rows,), generator=rng).tolist()
    chosen = order(lengths, prompt_index, CPU)
    lengths, prompt_index = ([values[row] for row in chosen] for values in (lengths, prompt_index))
    plan = Packed(prompts, lengths, prompt_index, CPU, shared=shared)
    rests = [length - shared for length in prompts]
    query, key, value = random_layer(rng, 1, shared + sum(rests) + sum(lengths))
    attended = plan.attend(0, query, key, value, SCALING)[0]  # (N, H, d)
    first, *sections = torch.split(torch.arange(attended.shape[0]), [shared, *rests, *lengths])
    whole = [torch.cat([first, rest]) for rest in sections[:3]]
    for row, own in enumerate(sections[3:]):
        seen = torch.cat([whole[prompt_index[row]], own])
        allowed = torch.ones(len(seen), len(seen), dtype=torch.bool).tril()
        expected = plain(query[0][:, seen], key[0][:, seen], value[0][:, seen], allowed)
        of_prompt = prompts[prompt_index[row]]
        torch.testing.assert_close(attended[own], expected[of_prompt:], atol=1e-6, rtol=0)
        torch.testing.assert_close(attended[whole[prompt_index[row]]], expected[:of_prompt], atol=1e-6, rtol=0)


def test_without_a_mask_completions_of_one_prompt_attend_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "maskless", lambda device: True)
    assert order([5, 3, 4, 1], [1, 0, 1, 0], CPU) == [3, 1, 2, 0]
    plan = Packed([2, 7], [1, 3, 4, 5], [0, 0, 1, 1], CPU)
    assert [(owner.tolist(), reach) for _, owner, reach, *_ in plan.buckets] == [([0, 0], 2), ([1, 1], 7)]
    assert all(isinstance(bias, CausalBias) for *_, bias, _ in plan.buckets)


class Conversation:
    """Prompts prefilled once, completions decoded token by token, and beside them every key and value fed in."""

    def __init__(self, prompt_lengths: list[int], num_generations: int, max_new_tokens: int, shared: int = 0) -> None:
        self.rng = torch.Generator().manual_seed(3)
        self.lengths, self.num_generations = prompt_lengths, num_generations
        self.prompt = random_layer(self.rng, len(prompt_lengths), max(prompt_lengths))
        first = [tensor[:1, :, :shared] for tensor in self.prompt]
        for tensor, alike in zip(self.prompt, first, strict=True):
            tensor[:, :, :shared] = alike
        prefill = Prefill()
        query, key, value = first
        before = prefill.attend(0, query, key, value, SCALING)
        prefill = Prefill(prefill) if shared else Prefill()
        query, key, value = (tensor[:, :, shared:] for tensor in self.prompt)
        rest = prefill.attend(0, query, key, value, SCALING)
        self.prefilled = torch.cat([before.expand(len(rest), -1, -1, -1), rest], dim=1)
        lengths = torch.tensor(prompt_lengths)
        self.plan = Decode(prefill, lengths, num_generations=num_generations, max_new_tokens=max_new_tokens)
        self.rows = torch.arange(len(prompt_lengths) * num_generations).view(-1, num_generations)
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {int(row): [] for row in self.rows.flatten()}

    def step(self) -> None:
        """Decode one token of every row and check each against plain attention over its own prompt and tokens."""
        ids = self.rows.flatten().tolist()
        query, key, value = random_layer(self.rng, len(ids), 1)
        attended = self.plan.attend(0, query, key, value, SCALING)  # (B, 1, H, d)
        self.plan.time += 1
        for place, row in enumerate(ids):
            self.seen[row].append((key[place], value[place]))
            prompt = row // self.num_generations
            keys, values = (
                torch.cat([of_prompt[prompt, :, : self.lengths[prompt]], *own], dim=1)
                for of_prompt, own in zip(self.prompt[1:], zip(*self.seen[row], strict=True), strict=True)
            )
            expected = plain(query[place], keys, values, torch.ones(1, keys.shape[1], dtype=torch.bool))
            torch.testing.assert_close(attended[place], expected, atol=1e-6, rtol=0)

    def keep(self, prompts: list[int], slots: list[list[int]]) -> None:
        self.plan.keep(torch.tensor(prompts), torch.tensor(slots))
        self.rows = self.rows[torch.tensor(prompts)].gather(1, torch.tensor(slots))


@pytest.mark.usefixtures("without_mask", "key_heads")
@pytest.mark.parametrize("shared", [0, 3])
def test_prefill_is_plain_causal_attention(shared: int) -> None:
    talk = Conversation([4, 7], num_generations=1, max_new_tokens=1, shared=shared)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    for prompt in range(2):
        query, key, value = (tensor[prompt] for tensor in talk.prompt)
        expected = plain(query, key, value, allowed)
        torch.testing.assert_close(talk.prefilled[prompt], expected, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("key_heads")
@pytest.mark.parametrize("num_generations", [1, GROUP - 1, GROUP])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("prompt_lengths", [[4, 7, 2], [5, 5, 5]])
def test_decode_attends_to_the_real_prompt_and_to_its_own_tokens(
    prompt_lengths: list[int], shared: int, num_generations: int
) -> None:
    talk = Conversation(prompt_lengths, num_generations, max_new_tokens=4, shared=shared)
    for _ in range(4):
        talk.step()


@pytest.mark.parametrize("shared", [0, 1])
def test_rows_that_are_kept_go_on_as_if_none_had_been_dropped(shared: int) -> None:
    talk = Conversation([4, 7, 2], num_generations=3, max_new_tokens=7, shared=shared)
    talk.step()
    talk.step()
    talk.keep([0, 2], [[2, 0], [1, 2]])
    assert talk.rows.tolist() == [[2, 0], [7, 8]]
    talk.step()
    talk.keep([1], [[1]])
    assert talk.rows.tolist() == [[8]]
    for _ in range(4):
        talk.step()


def test_decode_scores_in_the_hundreds_keep_float32_precision() -> None:
    """Qwen's biases: keys with a standard deviation of 30, queries of 8. bfloat16 scores would be off by 1 or 2."""
    rng = torch.Generator().manual_seed(5)
    key_bias, query_bias = (
        30 * torch.randn(KEY_HEADS, 1, 64, generator=rng),
        8 * torch.randn(HEADS, 1, 64, generator=rng),
    )
    query = (torch.randn(6, HEADS, 1, 64, generator=rng) + query_bias).bfloat16()
    prompt_keys = (torch.randn(2, KEY_HEADS, 40, 64, generator=rng) + key_bias).bfloat16()
    own_key = (torch.randn(6, KEY_HEADS, 1, 64, generator=rng) + key_bias).bfloat16()
    prompt_values, own_value = (torch.randn_like(keys) for keys in (prompt_keys, own_key))
    prefill = Prefill()
    prefill.keys, prefill.values = [prompt_keys], [prompt_values]
    plan = Decode(prefill, torch.tensor([40, 40]), num_generations=3, max_new_tokens=1)
    attended = plan.attend(0, query, own_key, own_value, 64**-0.5)[:, 0].float()  # (6, H, d)
    keys, values = (
        torch.cat([prompt.repeat_interleave(3, dim=0), own], dim=2).repeat_interleave(2, dim=1).float()
        for prompt, own in ((prompt_keys, own_key), (prompt_values, own_value))
    )
    scores = query.float() @ keys.mT * 64**-0.5
    assert scores.abs().max() > 100
    expected = (scores.softmax(-1) @ values)[:, :, 0]
    torch.testing.assert_close(attended, expected, atol=0.02, rtol=0.02)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # by torch 2.11
def test_gradients_of_a_shared_prompt_are_summed_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """`index_add`, which an index into the prompts leaves for the backward pass, adds by atomics on a GPU."""
    monkeypatch.setattr(attention, "maskless", lambda device: True)
    plan = Packed([3, 5], [2, 4, 4], [0, 1, 1], CPU)
    query, key, value = (part.requires_grad_() for part in random_layer(torch.Generator().manual_seed(1), 1, 18))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        plan.attend(0, query, key, value, SCALING).sum().backward()
    assert not {event.key for event in profiler.key_averages()} & {"aten::index_add_", "aten::index_add"}
