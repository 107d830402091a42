"""The algorithm against numbers worked out by hand, and `update` against a plain loop over single rows."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from conftest import default_loss, update
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.batch import Batch as StepBatch
from grpo_cli.core.rl.grpo import (
    Step,
    advantages,
    best_of,
    importance_ratio,
    kl_estimate,
    normalizer,
    overlong_penalty,
    policy_loss,
    sampler_weight,
    zero_variance,
)
from grpo_cli.core.rl.update import NotFinite, clip_gradients, reference_logprobs

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "cispo", "gspo")
TEMPERATURE = 1.2
MAX_NEW_TOKENS = 20


def a_loss(loss_type: str = "grpo", **changes: object) -> Loss:
    return default_loss(**{"loss_type": loss_type, "beta": 0.0, "sampler_correction": "none", **changes})


# Advantages


def test_advantages_are_centred_and_scaled_by_the_groups_deviation() -> None:
    # [1, 0.2, 0]: mean 0.4, variance (0.36 + 0.04 + 0.16) / 2 = 0.28, deviation 0.5291503
    # [1, 0, 0.5]: mean 0.5, variance (0.25 + 0.25 + 0) / 2 = 0.25, deviation 0.5
    found = advantages(torch.tensor([[1.0, 0.2, 0.0], [1.0, 0.0, 0.5]]))
    expected = [[0.6 / 0.5292503, -0.2 / 0.5292503, -0.4 / 0.5292503], [0.5 / 0.5001, -0.5 / 0.5001, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_batch_scaling_divides_by_the_deviation_of_all_rewards() -> None:
    # [1, 0, 0, 0]: mean 0.25, variance (0.5625 + 3 * 0.0625) / 3 = 0.25, deviation 0.5
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([[0.5 / 0.5001, -0.5 / 0.5001], [0.0, 0.0]])
    torch.testing.assert_close(advantages(rewards, scale="batch"), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages(rewards, scale="none"), torch.tensor([[0.5, -0.5], [0.0, 0.0]]))


def test_leave_one_out_subtracts_the_mean_of_the_other_completions() -> None:
    # [1, 0.2, 0]: means of the others 0.1, 0.5, 0.6
    found = advantages(torch.tensor([[1.0, 0.2, 0.0]]), scale="none", baseline="leave_one_out")
    torch.testing.assert_close(found, torch.tensor([[0.9, -0.3, -0.6]]))


def test_the_mean_as_a_scale_weighs_rare_successes_more() -> None:
    # means 1/4 and 3/4; a mean that is not positive has no such scale
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]])
    expected = [[3.0, -1.0, -1.0, -1.0], [1 / 3, 1 / 3, 1 / 3, -1.0], [0.0] * 4, [0.0] * 4]
    torch.testing.assert_close(advantages(rewards, scale="mean"), torch.tensor(expected))


def test_pass_at_2_of_one_success_in_four_by_hand() -> None:
    # 3 of 6 pairs have the success: mean 1/2, deviation 1/2. A failure is in 3 pairs, one of them with the success.
    found = advantages(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), pass_at_k=2)
    worse = (1 / 3 - 1 / 2) / 0.5001
    torch.testing.assert_close(found, torch.tensor([[worse, 0.5 / 0.5001, worse, worse]]))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_best_of_k_is_that_of_all_choices(k: int) -> None:
    rewards = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(k)) / 2
    values, mean, deviation = best_of(rewards, k)
    for row, own in enumerate(rewards.tolist()):
        best = {chosen: max(own[one] for one in chosen) for chosen in combinations(range(5), k)}
        with_it = [fmean(value for chosen, value in best.items() if one in chosen) for one in range(5)]
        assert values[row].tolist() == pytest.approx(with_it, abs=1e-6)
        assert (float(mean[row]), float(deviation[row])) == pytest.approx(
            (fmean(best.values()), pstdev(best.values())), abs=1e-4
        )


@pytest.mark.parametrize("scale", ["group", "batch", "none", "mean"])
@pytest.mark.parametrize("reward", [0.1, 0.2, 1.0, 0.0])
def test_equal_rewards_have_exactly_zero_advantage(scale: str, reward: float) -> None:
    for num_generations in range(2, 65):
        rewards = torch.full((2, num_generations), reward)
        rewards[1, 0] = 1.5
        found = advantages(rewards, scale=scale)
        assert found[0].tolist() == [0.0] * num_generations
        assert found[1, 0] > 0 > found[1, 1]
        assert zero_variance(rewards).tolist() == [True, False]


def test_equal_puzzles_stay_separate_groups() -> None:
    # One puzzle drawn twice: solved by every completion, then by none. Pooled, the advantages would be +-0.87.
    assert advantages(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).tolist() == [[0.0, 0.0], [0.0, 0.0]]


# The loss of a token


def test_k3_is_unbiased_for_the_true_kl_and_the_originals_estimate_is_not() -> None:
    policy, reference = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    # KL(policy || reference) = 0.7 log 7 + 0.2 log(2/3) + 0.1 log(1/6) = 1.362137 - 0.081093 - 0.179176
    true_kl = 1.101868
    expectation = {
        name: float((policy * kl_estimate(policy.log(), reference.log(), estimator=name)).sum())
        for name in ("k3", "original")
    }
    assert expectation["k3"] == pytest.approx(true_kl, abs=1e-5)
    # E[p/q] - E[log(p/q)] - 1 = (4.9 + 0.133333 + 0.016667) - 1.101868 - 1
    assert expectation["original"] == pytest.approx(2.948132, abs=1e-5)


def losses(
    loss: Loss, ratios: Sequence[float], advantage: float, mask: Sequence[bool] = (True, True, True)
) -> tuple[list[float], list[bool], list[float]]:
    """Loss, clipping and gradient of each token of one row whose log-probabilities are -1 and ratios as given."""
    logprobs = torch.full((1, len(ratios)), -1.0, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - torch.tensor([ratios], dtype=torch.float64).log()
    gain = torch.tensor([advantage], dtype=torch.float64)
    ratio = importance_ratio(logprobs, old, torch.tensor([mask]), loss)
    per_token, clipped = policy_loss(logprobs, ratio, gain, loss)
    per_token.sum().backward()
    assert logprobs.grad is not None
    return per_token[0].tolist(), clipped[0].tolist(), logprobs.grad[0].tolist()


def test_a_good_completion_gains_nothing_above_the_clip_range() -> None:
    # -min(1.5 * 2, 1.2 * 2), -min(0.5 * 2, 0.8 * 2), -min(1.1 * 2, 1.1 * 2); the gradient of -ratio * A is itself
    per_token, clipped, gradient = losses(a_loss(), [1.5, 0.5, 1.1], 2.0)
    assert per_token == pytest.approx([-2.4, -1.0, -2.2])
    assert clipped == [True, False, False]
    assert gradient == pytest.approx([0.0, -1.0, -2.2])


def test_a_bad_completion_gains_nothing_below_the_clip_range() -> None:
    # -min(-1.5, -1.2), -min(-0.5, -0.8), -min(-1.1, -1.1)
    per_token, clipped, gradient = losses(a_loss(), [1.5, 0.5, 1.1], -1.0)
    assert per_token == pytest.approx([1.5, 0.8, 1.1])
    assert clipped == [False, True, False]
    assert gradient == pytest.approx([1.5, 0.0, 1.1])


def test_epsilon_high_widens_the_range_above_alone() -> None:
    per_token, clipped, _ = losses(a_loss(epsilon_high=0.6), [1.5, 1.7, 0.5], 2.0)
    assert per_token == pytest.approx([-3.0, -3.2, -1.0])
    assert clipped == [False, True, False]


def test_cispo_weights_every_logprob_by_its_capped_ratio() -> None:
    # -min(ratio, 1.2) * A * l with l = -1; the gradient is -min(ratio, 1.2) * A, clipped or not
    per_token, clipped, gradient = losses(a_loss("cispo"), [1.5, 0.5, 1.1], 2.0)
    assert per_token == pytest.approx([2.4, 1.0, 2.2])
    assert clipped == [True, False, False]
    assert gradient == pytest.approx([-2.4, -1.0, -2.2])
    assert losses(a_loss("cispo"), [1.5, 0.5, 1.1], 0.0)[1] == [False, False, False]


def test_gspo_gives_every_token_the_ratio_of_its_sequence() -> None:
    # exp((log 1.5 + log 0.5) / 2) = sqrt(0.75) = 0.8660254; the third token is padding
    per_token, clipped, gradient = losses(a_loss("gspo"), [1.5, 0.5, 7.0], 2.0, mask=(True, True, False))
    assert per_token[:2] == pytest.approx([-1.7320508, -1.7320508])
    assert clipped[:2] == [False, False]
    assert gradient[2] == 0.0
    per_token, clipped, _ = losses(a_loss("gspo"), [1.5, 1.5, 0.01], 2.0, mask=(True, True, False))
    assert per_token[:2] == pytest.approx([-2.4, -2.4])
    assert clipped[:2] == [True, True]


def test_dual_clip_bounds_the_loss_of_a_bad_completion() -> None:
    # -min(-1.5, -1.2), -min(-2, -1.2) where the ratio 3 is capped at 2, -min(-0.5, -0.8)
    per_token, clipped, gradient = losses(a_loss(dual_clip=2.0), [1.5, 3.0, 0.5], -1.0)
    assert per_token == pytest.approx([1.5, 2.0, 0.8])
    assert clipped == [False, True, True]
    assert gradient == pytest.approx([1.5, 0.0, 0.0])
    assert losses(a_loss(dual_clip=2.0), [1.5, 3.0, 0.5], 1.0) == losses(a_loss(), [1.5, 3.0, 0.5], 1.0)


def test_the_level_of_the_ratio_is_independent_of_the_normaliser() -> None:
    given = ([1.5, 0.5], 2.0, (True, True))
    by_sequence, by_token = losses(a_loss("gspo"), *given), losses(a_loss(), *given)
    assert by_sequence == losses(a_loss("dapo", ratio_level="sequence"), *given) != by_token
    assert by_token == losses(a_loss("gspo", ratio_level="token"), *given)


@pytest.mark.parametrize(
    ("kind", "level", "expected"),
    [
        ("truncate", "token", [1.5, 2.0, 0.5]),
        ("mask", "token", [1.5, 0.0, 0.5]),
        ("truncate", "sequence", [2.0, 2.0, 2.0]),  # 1.5 * 3 * 0.5 = 2.25
        ("mask", "sequence", [0.0, 0.0, 0.0]),
    ],
)
def test_weights_that_correct_for_the_sampler(kind: str, level: str, expected: list[float]) -> None:
    ratios, mask = torch.tensor([[1.5, 3.0, 0.5, 9.0]]), torch.tensor([[True, True, True, False]])
    loss = a_loss(sampler_correction=kind, sampler_level=level)
    found = sampler_weight(ratios.log() - 1, torch.full((1, 4), -1.0), mask, loss)
    torch.testing.assert_close(found[0, :3], torch.tensor(expected))


def test_kl_estimators_by_hand() -> None:
    # d = l_ref - l = 0.5: -0.5, 0.125, exp(0.5) - 1.5 = 0.1487213, and that times a ratio of 2; exp(-0.5) - 0.5
    own, reference, ratio = torch.tensor([[-1.5]]), torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    by_hand = {"k1": -0.5, "k2": 0.125, "k3": 0.1487213, "k3_unbiased": 0.2974425, "original": 0.1065307}
    for name, expected in by_hand.items():
        found = kl_estimate(own, reference, estimator=name, ratio=ratio)
        assert float(found) == pytest.approx(expected, abs=1e-6), name


def test_mean_gradients_of_the_estimators_over_all_samples() -> None:
    """Of a policy over three tokens, exactly: only k2's and k3_unbiased's is that of the KL; k1's is 0."""
    logits = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    own = logits.log_softmax(dim=0)
    (exact,) = torch.autograd.grad((own.exp() * (own - reference)).sum(), logits, retain_graph=True)
    mean = {}
    for name in ("k1", "k2", "k3", "k3_unbiased"):
        ratio = (own - own.detach()).exp()
        expectation = (own.detach().exp() * kl_estimate(own, reference, estimator=name, ratio=ratio)).sum()
        (mean[name],) = torch.autograd.grad(expectation, logits, retain_graph=True)
    torch.testing.assert_close(mean["k3_unbiased"], exact)
    torch.testing.assert_close(mean["k2"], exact)
    torch.testing.assert_close(mean["k1"], torch.zeros_like(exact))
    assert float((mean["k3"] - exact).abs().max()) > 0.03


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / 2, 1 / 6]),  # half of each row's mean
        ("gspo", [1 / 2, 1 / 6]),
        ("dapo", [1 / 4, 1 / 4]),  # 4 tokens in all
        ("cispo", [1 / 4, 1 / 4]),
        ("dr_grpo", [1 / 20, 1 / 20]),  # 2 rows of at most 10 tokens
    ],
)
def test_normalizer_of_rows_of_one_and_three_tokens(loss_type: str, expected: list[float]) -> None:
    found = normalizer(torch.tensor([1, 3]), loss_type=loss_type, max_new_tokens=10)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_micro_batches_take_every_row_once_in_order() -> None:
    assert MicroBatch(2).split([4, 1, 3, 0, 2]) == [[4, 1], [3, 0], [2]]
    assert MicroBatch(0).split([4, 1, 3]) == [[4, 1, 3]]
    assert MicroBatch(0).split([]) == []


# One update


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients that it is handed, and leaves the weights alone."""

    def __init__(self, policy: Policy) -> None:
        self.gradients: list[Tensor] = []
        self.steps: list[list[Tensor]] = []
        super().__init__(policy.model.parameters(), {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.gradients = [parameter.grad.clone() for parameter in self.param_groups[0]["params"]]
        self.steps.append(self.gradients)


class Batch:
    """Ten ragged completions of three prompts, two rows of them without advantage, and noisy reference log-probs."""

    def __init__(self, policy: Policy) -> None:
        rng = torch.Generator().manual_seed(11)

        def tokens(length: int) -> list[int]:
            found: list[int] = torch.randint(0, 800, (length,), generator=rng).tolist()
            return found

        completions = [tokens(length) for length in (5, 1, 17, 9, 9, 3, 20, 12, 2, 6)]
        prompt_index = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
        self.sequences = Sequences([tokens(7), tokens(15), tokens(4)], completions, prompt_index)
        self.advantage = torch.randn(10, generator=rng)
        self.advantage[[2, 7]] = 0.0
        self.lengths = torch.tensor([len(completion) for completion in completions])
        exact = reference_logprobs(Reference(policy), self.sequences, temperature=TEMPERATURE)
        self.ref_logprobs = exact + 0.5 * torch.randn(exact.shape, generator=rng)  # padding too

    def reordered(self, prompts: list[int], rows: list[int]) -> "Batch":
        """The same step with its prompts and its rows in another order."""
        given, other = self.sequences, copy.copy(self)
        index = [prompts.index(given.prompt_index[row]) for row in rows]
        completions = [given.completions[row] for row in rows]
        other.sequences = Sequences([given.prompts[prompt] for prompt in prompts], completions, index)
        other.advantage, other.ref_logprobs = self.advantage[rows], self.ref_logprobs[rows]
        return other


def one_update(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, **given: Any) -> dict[str, float]:
    """The metrics of an update by `a_loss`, unless another loss is given."""
    settings = {"loss": a_loss(), "temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS, **given}
    return update(policy, optimizer, batch.sequences, settings.pop("advantages", batch.advantage), **settings)


def plain_update(
    policy: Policy,
    batch: Batch,
    loss: Loss,
    old: list[Tensor] | None = None,
    *,
    sampled: Sequence[Sequence[float]] = (),
    masked: Sequence[int] = (),
    rows: Sequence[int] | None = None,
) -> tuple[float, list[Tensor]]:
    """Loss and gradients by the formulas of design.md, one row at a time, with nothing skipped and nothing padded.

    `masked` rows count as rows of the step, but not their tokens. Only `rows` contribute, by default all.
    """
    policy.model.zero_grad()
    total, kept = torch.zeros(()), [row for row in range(len(batch.lengths)) if row not in masked]
    step = Step(len(batch.lengths), int(batch.lengths[kept].sum()), has_gradient=True)
    weights = normalizer(batch.lengths, loss_type=loss.loss_type, max_new_tokens=MAX_NEW_TOKENS, step=step)
    passes = {
        row: policy.logprobs(batch.sequences.subset([row]), temperature=TEMPERATURE, entropy="gradient") for row in kept
    }
    entropies = torch.cat([passes[row][1][0].detach() for row in kept])
    threshold = entropies.quantile(1 - loss.entropy_share)
    for row in kept if rows is None else rows:
        (alone, entropy), length = passes[row], int(batch.lengths[row])
        before = alone.detach() if old is None else old[row]
        mask = torch.ones(1, length, dtype=torch.bool)
        ratio = importance_ratio(alone, before, mask, loss)
        per_token, _ = policy_loss(alone, ratio, batch.advantage[row : row + 1], loss)
        if sampled:
            per_token = per_token * sampler_weight(before, torch.tensor([sampled[row]]), mask, loss)
        chosen = (entropy.detach() >= threshold).float()
        per_token = per_token * chosen
        if loss.beta > 0:
            reference = batch.ref_logprobs[row : row + 1, :length]
            per_token = per_token + loss.beta * kl_estimate(alone, reference, estimator=loss.kl_estimator, ratio=ratio)
        total = total + weights[row] * per_token.sum()
        total = total - loss.entropy_bonus * (entropy * chosen).sum() / (entropies >= threshold).sum()
    total.backward()
    gradients = [parameter.grad.clone() for parameter in policy.model.parameters() if parameter.grad is not None]
    policy.model.zero_grad()
    return total.item(), gradients


def recorded(policy: Policy, batch: Batch, loss: Loss, **given: Any) -> tuple[dict[str, float], list[Tensor]]:
    """Metrics and gradients of an update that leaves the weights alone."""
    recorder = Recorder(policy)
    return one_update(policy, recorder, batch, loss=loss, clip_grad_norm=math.inf, **given), recorder.gradients


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 26
    assert max(float(gradient.abs().max()) for gradient in expected) > 0.01
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_gradient_is_that_of_single_rows_whatever_the_micro_batches(
    tiny_policy: Policy, loss_type: str, beta: float
) -> None:
    batch, loss = Batch(tiny_policy), a_loss(loss_type, beta=beta)
    expected_loss, expected = plain_update(tiny_policy, batch, loss)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected))
    for micro_batch_size in (0, 1, 3, 64):
        ref_logprobs = batch.ref_logprobs if beta > 0 else None
        rows = MicroBatch(micro_batch_size)
        metrics, found = recorded(tiny_policy, batch, loss, micro_batch=rows, ref_logprobs=ref_logprobs)
        assert_same(found, expected)
        assert metrics["loss"] == pytest.approx(expected_loss, abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


CHOICES: list[dict[str, Any]] = [
    {"mask_truncated": True},
    {"entropy_share": 0.3, "beta": 0.2},
    {"entropy_bonus": 0.5, "loss_type": "dapo"},
    {"entropy_bonus": 0.5, "entropy_share": 0.2, "mask_truncated": True, "loss_type": "cispo"},
    {"sampler_correction": "truncate", "sampler_cap": 1.05, "loss_type": "dr_grpo"},
    {"sampler_correction": "mask", "sampler_level": "sequence", "sampler_cap": 1.05, "entropy_share": 0.5},
    {"kl_estimator": "k3_unbiased", "beta": 0.3},
    {"kl_estimator": "k2", "beta": 0.3, "loss_type": "dapo", "mask_truncated": True},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice))
@pytest.mark.parametrize("rows", [0, 3])
def test_every_choice_gives_the_gradient_of_single_rows(tiny_policy: Policy, choice: dict[str, Any], rows: int) -> None:
    batch, rng = Batch(tiny_policy), torch.Generator().manual_seed(2)
    loss, cut = a_loss(**choice), [1, 6]
    with torch.no_grad():
        exact = tiny_policy.logprobs(batch.sequences, temperature=TEMPERATURE)[0]
    noisy = exact + 0.3 * torch.randn(exact.shape, generator=rng)
    sampled = [row[:length].tolist() for row, length in zip(noisy, batch.lengths.tolist(), strict=True)]
    corrects = loss.sampler_correction != "none"
    total, expected = plain_update(
        tiny_policy, batch, loss, sampled=sampled if corrects else (), masked=cut if loss.mask_truncated else ()
    )
    metrics, found = recorded(
        tiny_policy,
        batch,
        loss,
        micro_batch=MicroBatch(rows),
        ref_logprobs=batch.ref_logprobs if loss.beta else None,
        sampled_logprobs=sampled,
        truncated=[row in cut for row in range(len(batch.lengths))],
    )
    assert metrics["loss"] == pytest.approx(total, abs=1e-5)
    assert metrics["sampler_gap"] > 0.1
    assert_same(found, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_each_mini_batch_has_the_gradient_of_its_prompts(tiny_policy: Policy, loss_type: str) -> None:
    batch, recorder, loss = Batch(tiny_policy), Recorder(tiny_policy), a_loss(loss_type, beta=0.2)
    one_update(
        tiny_policy, recorder, batch, loss=loss, ref_logprobs=batch.ref_logprobs, num_mini_batches=3,
        num_inner_updates=2, clip_grad_norm=math.inf, micro_batch=MicroBatch(2),
    )  # fmt: skip
    parts = [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert len(recorder.steps) == 2 * len(parts)
    for rows, found in zip(2 * parts, recorder.steps, strict=True):
        _, expected = plain_update(tiny_policy, batch, loss, rows=rows)
        assert_same(found, [3 * gradient for gradient in expected])


def test_mini_batches_measure_their_ratio_from_before_the_first(tiny_policy: Policy) -> None:
    batch, loss = Batch(tiny_policy), a_loss()
    with torch.no_grad():
        exact = tiny_policy.logprobs(batch.sequences, temperature=TEMPERATURE)[0]
    old = [row[None, :length] for row, length in zip(exact, batch.lengths.tolist(), strict=True)]
    other = copy.deepcopy(tiny_policy)
    optimizers = [torch.optim.SGD(policy.model.parameters(), lr=0.5) for policy in (tiny_policy, other)]
    one_update(tiny_policy, optimizers[0], batch, loss=loss, num_mini_batches=3, clip_grad_norm=math.inf)
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7, 8, 9]):
        _, gradients = plain_update(other, batch, loss, old, rows=rows)
        for weight, gradient in zip(other.model.parameters(), gradients, strict=True):
            weight.grad = 3 * gradient
        optimizers[1].step()
    for ours, theirs in zip(tiny_policy.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompts", [[2, 0, 1], [1, 2, 0]])
def test_the_order_of_prompts_and_rows_changes_nothing(tiny_policy: Policy, prompts: list[int]) -> None:
    batch, loss = Batch(tiny_policy), a_loss(beta=0.3)
    metrics, expected = recorded(tiny_policy, batch, loss, ref_logprobs=batch.ref_logprobs)
    other = batch.reordered(prompts, [9, 0, 5, 3, 7, 1, 2, 8, 6, 4])
    reordered, found = recorded(tiny_policy, other, loss, micro_batch=MicroBatch(4), ref_logprobs=other.ref_logprobs)
    assert_same(found, expected)
    assert reordered == pytest.approx(metrics, abs=1e-5)


def test_rows_without_advantage_have_a_gradient_only_with_kl_and_the_same_entropy_always(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(tiny_policy)
    seen: list[tuple[int, bool]] = []
    logprobs = Policy.logprobs

    def counting(policy: Policy, sequences: Sequences, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append((len(sequences.completions), torch.is_grad_enabled()))
        return logprobs(policy, sequences, **options)

    monkeypatch.setattr(Policy, "logprobs", counting)
    without, _ = recorded(tiny_policy, batch, a_loss())
    with_kl, _ = recorded(tiny_policy, batch, a_loss(beta=0.1), ref_logprobs=batch.ref_logprobs)
    assert seen == [(8, True), (2, False), (10, True)]
    for name in ("entropy", "clip_fraction"):
        assert without[name] == pytest.approx(with_kl[name], rel=1e-6)


def test_kl_and_entropy_are_means_over_all_tokens(tiny_policy: Policy) -> None:
    batch = Batch(tiny_policy)
    metrics, _ = recorded(
        tiny_policy, batch, a_loss(beta=0.1), micro_batch=MicroBatch(3), ref_logprobs=batch.ref_logprobs
    )
    with torch.no_grad():
        logprobs, entropy = tiny_policy.logprobs(batch.sequences, temperature=TEMPERATURE)
    mask = batch.sequences.mask()
    assert metrics["kl"] == pytest.approx(float(kl_estimate(logprobs, batch.ref_logprobs)[mask].mean()), abs=1e-5)
    assert metrics["entropy"] == pytest.approx(float(entropy[mask].mean()), abs=1e-5)
    assert metrics["clip_fraction"] == 0.0


def test_reference_logprobs_are_the_policys_at_the_start(tiny_policy: Policy) -> None:
    batch = Batch(tiny_policy)
    expected, _ = tiny_policy.logprobs(batch.sequences, temperature=TEMPERATURE)
    for size in (0, 1, 4):
        found = reference_logprobs(
            Reference.of(tiny_policy), batch.sequences, temperature=TEMPERATURE, micro_batch=MicroBatch(size)
        )
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)


def gap_of(policy: Policy, batch: Batch, sampled: list[list[float]], *, fit: MicroBatch | None = None) -> float:
    """The `logprob_gap` of an update on completions that were sampled with these log-probs."""
    return one_update(policy, Recorder(policy), batch, micro_batch=fit, sampled_logprobs=sampled)["logprob_gap"]


def test_logprob_gap_is_the_distance_of_two_rows_from_the_models_own_forward(tiny_policy: Policy) -> None:
    batch = Batch(tiny_policy)
    exact, _ = tiny_policy.logprobs(batch.sequences, temperature=TEMPERATURE)
    sampled = [
        [value + row for value in exact[row, :length].tolist()] for row, length in enumerate(batch.lengths.tolist())
    ]
    assert gap_of(tiny_policy, batch, sampled, fit=MicroBatch(3)) == pytest.approx(
        (0 * 5 + 9 * 6) / (5 + 6), abs=1e-5
    )  # rows 0 and 9


@pytest.mark.parametrize("samples_so_too", [False, True])
def test_logprob_gap_shows_a_packed_pass_that_is_wrong(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, samples_so_too: bool
) -> None:
    batch = Batch(tiny_policy)
    exact, _ = tiny_policy.logprobs(batch.sequences, temperature=TEMPERATURE)
    right = Policy.logits
    monkeypatch.setattr(Policy, "logits", lambda policy, hidden: right(policy, hidden) / 4)  # drops a scale
    wrong, _ = tiny_policy.logprobs(batch.sequences, temperature=TEMPERATURE)
    sampled = (wrong if samples_so_too else exact).detach()
    rows = [row[:length].tolist() for row, length in zip(sampled, batch.lengths.tolist(), strict=True)]
    distance = (wrong - exact).detach().abs()
    gap = gap_of(tiny_policy, batch, rows)
    assert gap == pytest.approx(float(distance[[0, 9]].sum()) / (5 + 6), rel=1e-3)
    assert gap > 0.1


def test_the_second_inner_update_measures_its_ratio_from_before_the_first(tiny_policy: Policy) -> None:
    batch, loss = Batch(tiny_policy), a_loss("dapo", beta=0.1)
    by_hand = copy.deepcopy(tiny_policy)
    optimizer = torch.optim.SGD(by_hand.model.parameters(), lr=0.3)
    rows = range(len(batch.lengths))
    old = [by_hand.logprobs(batch.sequences.subset([row]), temperature=TEMPERATURE)[0].detach() for row in rows]
    expected_losses = []
    for _ in range(2):
        value, gradients = plain_update(by_hand, batch, loss, old)
        expected_losses.append(value)
        for parameter, gradient in zip(by_hand.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    sgd = torch.optim.SGD(tiny_policy.model.parameters(), lr=0.3)
    given = {"num_inner_updates": 2, "clip_grad_norm": math.inf, "ref_logprobs": batch.ref_logprobs}
    metrics = one_update(tiny_policy, sgd, batch, loss=loss, micro_batch=MicroBatch(4), **given)
    for found, expected in zip(tiny_policy.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert metrics["loss"] == pytest.approx(sum(expected_losses) / 2, abs=1e-4)
    assert 0 < metrics["clip_fraction"] < 0.5  # the first of the two has none


def weights(policy: Policy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def infinite_loss(policy: Policy, advantage: Tensor) -> str:
    advantage[0] = math.inf
    return "loss"


def infinite_gradient(policy: Policy, advantage: Tensor) -> str:
    next(policy.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    return "gradient norm"


@pytest.mark.faults
@pytest.mark.parametrize("spoil", [infinite_loss, infinite_gradient])
def test_a_loss_or_gradient_that_is_not_finite_leaves_the_weights_alone(
    tiny_policy: Policy, spoil: Callable[[Policy, Tensor], str]
) -> None:
    batch = Batch(tiny_policy)
    before = weights(tiny_policy)
    what = spoil(tiny_policy, batch.advantage)
    optimizer = torch.optim.AdamW(tiny_policy.model.parameters(), lr=1.0)
    with pytest.raises(NotFinite, match=f"the {what} is not finite"):
        one_update(tiny_policy, optimizer, batch, micro_batch=MicroBatch(3))
    assert all(map(torch.equal, before, tiny_policy.model.parameters()))
    assert all(parameter.grad is None for parameter in tiny_policy.model.parameters())
    assert not optimizer.state


def test_a_step_without_any_advantage_moves_nothing(tiny_policy: Policy) -> None:
    batch = Batch(tiny_policy)
    before = weights(tiny_policy)
    optimizer = torch.optim.AdamW(tiny_policy.model.parameters(), lr=1.0, weight_decay=0.1)
    metrics = one_update(tiny_policy, optimizer, batch, advantages=torch.zeros(10))
    assert metrics["weights_changed"] == metrics["loss"] == metrics["grad_norm"] == 0.0
    assert metrics["entropy"] > 1  # of all completions, as in any other step
    assert all(map(torch.equal, before, tiny_policy.model.parameters()))


def test_clip_grad_norm_bounds_the_step(tiny_policy: Policy) -> None:
    batch = Batch(tiny_policy)
    before = weights(tiny_policy)
    sgd = torch.optim.SGD(tiny_policy.model.parameters(), lr=1.0)
    metrics = one_update(tiny_policy, sgd, batch, clip_grad_norm=0.01)
    moved = [old - new for old, new in zip(before, weights(tiny_policy), strict=True)]
    length = math.sqrt(sum(float(step.square().sum()) for step in moved))
    assert length == pytest.approx(0.01, rel=1e-2)
    assert metrics["grad_norm"] > 0.1  # as it was before it was scaled down


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1003, 50, dtype=torch.bfloat16)) for _ in range(5)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.01)
    exact = math.sqrt(5 * 1003 * 50) * float(torch.tensor(0.01, dtype=torch.bfloat16))
    assert float(clip_gradients(weights, 1.0)) == pytest.approx(exact, rel=1e-5)
    left = math.sqrt(sum(float(weight.grad.double().square().sum()) for weight in weights if weight.grad is not None))
    assert left == pytest.approx(1.0, rel=4e-3)  # rounded to bfloat16, element by element


@pytest.mark.parametrize(("precision", "least", "most"), [("float32", 0.99, 1.0), ("bf16", 0.001, 0.1)])
def test_steps_of_2e_6_move_nearly_all_float32_weights_and_few_of_bf16(
    tiny_folder: Path, precision: Literal["float32", "bf16"], least: float, most: float
) -> None:
    policy = load(str(tiny_folder), device="cpu", precision=precision)
    batch = Batch(policy)
    metrics = one_update(policy, torch.optim.AdamW(policy.model.parameters(), lr=2e-6, weight_decay=0.0), batch)
    assert least <= metrics["weights_changed"] <= most


def test_weights_changed_counts_each_weight_once(tiny_policy: Policy) -> None:
    class NudgeTheNorms(Recorder):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.data += float(parameter.shape == (32,)) * torch.arange(parameter.numel()).view_as(parameter)

    batch = Batch(tiny_policy)
    metrics = one_update(tiny_policy, NudgeTheNorms(tiny_policy), batch)
    # 5 norms and 2 query biases of 32 weights, of each of which all but the first are nudged
    count = sum(parameter.numel() for parameter in tiny_policy.model.parameters())
    assert metrics["weights_changed"] == pytest.approx(7 * 31 / count)


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (80, 0), (81, 0.05), (90, 0.5), (95, 0.75), (100, 1), (16, 0)])
def test_the_overlong_penalty_grows_from_the_soft_limit_to_the_hard_one(length: int, penalty: float) -> None:
    """L_max = 100 and L_cache = 20: (80 - 90) / 20 = -0.5 by the paper's formula."""
    assert overlong_penalty(length, soft_limit=80, max_new_tokens=100) == pytest.approx(penalty)
    assert overlong_penalty(length, soft_limit=0, max_new_tokens=200) == length / 200


def test_the_overlong_penalty_of_the_papers_limits() -> None:
    limits = {"soft_limit": 20_480 - 4_096, "max_new_tokens": 20_480}
    assert [overlong_penalty(length, **limits) for length in (16_384, 17_408, 18_432, 20_480)] == [0, 0.25, 0.5, 1]


def test_the_kl_of_a_completion_is_the_sum_of_its_log_ratios() -> None:
    groups = [
        SimpleNamespace(prompt_index=3, completions=[[1, 2], [1]], logprobs=[[-1.0, -0.5], [-2.0]]),
        SimpleNamespace(prompt_index=5, completions=[[1], [1, 2]], logprobs=[[-0.25], [-1.0, -3.0]]),
    ]
    batch: Any = StepBatch(1, groups, None, {}, 6)  # type: ignore[arg-type]
    reference = torch.tensor([[-2.0, -1.0], [-1.5, 0.0], [-0.25, 0.0], [-1.0, -1.0]])  # zeros are padding
    assert batch.kl_to(reference).tolist() == [1.5, -0.5, 0.0, -2.0]
