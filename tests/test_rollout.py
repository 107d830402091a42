"""Sampling: equal to `generate`, to the trainer's own log-probabilities, and to itself however the batch is cut."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rollout.decode import LARGE, choose
from grpo_cli.core.rollout.engine import Rollout, uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle

# Prompts of different lengths, so that padding is always in play.
PUZZLES: list[tuple[Puzzle, Style]] = [
    (Puzzle((3, 5, 2), 13), "zero-shot"),
    (Puzzle((4, 7, 3, 9), 25), "one-shot"),
    (Puzzle((2, 8), 10), "natural"),
]


def encoded(policy: Policy) -> list[list[int]]:
    return [policy.encode(prompt(puzzle, style)) for puzzle, style in PUZZLES]


def rolled(policy: Policy, prompts: list[list[int]], uniform: torch.Tensor | None, **settings: float) -> Rollout:
    num_generations = 1 if uniform is None else uniform.shape[1]
    return LocalEngine(policy).sample(
        prompts,
        SamplingParams(int(settings.get("max_new_tokens", 48)), settings.get("temperature", 1.0), num_generations),
        uniform=uniform,
    )


def with_frequent_end(policy: Policy) -> Policy:
    """The same policy with more end-of-sequence ids, so that rows of a random model end at all sorts of lengths."""
    return replace(policy, end_ids=tuple(range(0, 832, 16)))


def test_greedy_output_equals_generate_token_for_token(tiny_policy: Policy, tiny_folder: Path) -> None:
    policy = with_frequent_end(tiny_policy)
    prompts = encoded(policy)
    found = rolled(policy, prompts, None)
    peer = AutoModelForCausalLM.from_pretrained(tiny_folder)
    settings = GenerationConfig(max_new_tokens=48, do_sample=False, eos_token_id=list(policy.end_ids), pad_token_id=0)
    lengths = []
    for tokens, completion in zip(prompts, found.completions, strict=True):
        expected = peer.generate(torch.tensor([tokens]), generation_config=settings)[0, len(tokens) :].tolist()
        assert completion == expected
        lengths.append(len(completion))
    assert len(set(lengths)) > 1


def test_sampled_logprobs_equal_the_trainers(tiny_policy: Policy) -> None:
    policy = with_frequent_end(tiny_policy)
    prompts = encoded(policy)
    rollout = rolled(policy, prompts, uniforms(1, 2, [0, 1, 2], 8, 48), temperature=1.3)
    prompt_index = [row // 8 for row in range(24)]
    logprobs, _ = policy.logprobs(Sequences(prompts, rollout.completions, prompt_index), temperature=1.3)
    for row, sampled in enumerate(rollout.logprobs):
        torch.testing.assert_close(logprobs[row, : len(sampled)], torch.tensor(sampled), atol=1e-4, rtol=0)
    assert len({len(completion) for completion in rollout.completions}) > 5


@pytest.mark.parametrize("split", [[[0], [1], [2]], [[2, 0], [1]], [[1, 2, 0]]])
def test_the_batch_split_does_not_change_what_is_sampled(tiny_policy: Policy, split: list[list[int]]) -> None:
    policy = with_frequent_end(tiny_policy)
    prompts = encoded(policy)
    whole = rolled(policy, prompts, uniforms(5, 3, [0, 1, 2], 4, 48))
    for chosen in split:
        part = rolled(policy, [prompts[index] for index in chosen], uniforms(5, 3, chosen, 4, 48))
        expected = [whole.completions[index * 4 + g] for index in chosen for g in range(4)]
        assert part.completions == expected


def test_every_end_id_ends_a_row_and_is_kept(tiny_policy: Policy) -> None:
    policy = with_frequent_end(tiny_policy)
    rollout = rolled(policy, encoded(policy), uniforms(0, 0, [0, 1, 2], 16, 48))
    ends = set(policy.end_ids)
    for completion, truncated in zip(rollout.completions, rollout.truncated, strict=True):
        assert not ends & set(completion[:-1])
        assert (completion[-1] not in ends) == truncated
        assert len(completion) == 48 or not truncated
    assert {completion[-1] for completion in rollout.completions} & ends
    assert any(rollout.truncated) and not all(rollout.truncated)


def test_choose_takes_the_first_token_whose_cumulative_probability_exceeds_u() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(4, -1)
    tokens, logprobs = choose(logits, torch.tensor([0.0, 0.099, 0.1001, 0.999]), SamplingParams(1, 1.0))
    assert tokens.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.1, 0.2, 0.7]))


def test_temperature_reshapes_the_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0]])
    _, logprobs = choose(logits, torch.tensor([0.999]), SamplingParams(1, 2.0))
    assert logprobs.item() == pytest.approx(-0.3132617, abs=1e-6)  # log(e / (1 + e))


def test_impossible_tokens_are_never_chosen() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    assert choose(logits, torch.tensor([0.0, 0.5, 1 - 1e-9], dtype=torch.float64), SamplingParams(1, 1.0))[
        0
    ].tolist() == [1, 1, 1]


def test_draws_are_uniform_between_rows_and_within() -> None:
    draws = uniforms(3, 1, range(250), 8, 16)
    for dim in range(3):  # neighbours along each dimension are independent: the mean of x * y is 1 / 4
        product = draws.narrow(dim, 1, draws.shape[dim] - 1) * draws.narrow(dim, 0, draws.shape[dim] - 1)
        assert float(product.mean()) == pytest.approx(1 / 4, abs=0.006)
    counts = torch.histc(draws.flatten(), bins=100, min=0.0, max=1.0)
    expected = draws.numel() / 100
    assert float(((counts - expected) ** 2 / expected).sum()) < 150  # chi squared of 99 degrees: p = 0.0007
    assert float(draws.min()) >= 0 and float(draws.max()) < 1


@pytest.mark.parametrize("pair", [(41026, 82734), (29148, 120673), (35564, 129419)])
def test_rows_whose_hashes_share_32_bits_differ(pair: tuple[int, int]) -> None:
    first, second = uniforms(0, 0, pair, 1, 8)[:, 0]
    assert not torch.equal(first, second)


def test_draws_depend_on_seed_step_prompt_and_sample() -> None:
    base = uniforms(0, 0, [0, 1], 2, 3)
    rows = {tuple(row.tolist()) for row in base.view(4, 3)}
    rows |= {tuple(uniforms(*place, [0], 1, 3).flatten().tolist()) for place in ((1, 0), (0, 1))}
    assert len(rows) == 6
    assert torch.equal(uniforms(0, 0, [1], 1, 3)[0, 0], base[1, 0])


@pytest.mark.parametrize("vocabulary", [832, LARGE, LARGE + 37])
def test_evenly_spaced_uniforms_draw_each_token_in_proportion_to_its_probability(vocabulary: int) -> None:
    rng = torch.Generator().manual_seed(vocabulary)
    logits, draws = 3 * torch.randn(1, vocabulary, generator=rng), 4000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens, logprobs = choose(logits.expand(draws, -1), uniform, SamplingParams(1, 1.0))
    expected = logits[0].double().softmax(-1)
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert (counts - draws * expected).abs().max() < 1.001  # exactly in proportion but for the ends of each interval
    plain = torch.searchsorted(expected.cumsum(-1), uniform, right=True)
    assert (tokens == plain).float().mean() > 0.999  # which were rounded in another way
    torch.testing.assert_close(logprobs, expected.log().float()[tokens], atol=1e-5, rtol=0)
