"""A step taken apart: the terms of the loss add up to it, and completions fork where right and wrong part."""

import math
from typing import Any

import pytest
import torch
from test_grpo import LOSS_TYPES, MAX_NEW_TOKENS, TEMPERATURE, a_loss

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.explain import OWN, Branch, fork, terms, variants
from grpo_cli.core.rl.grpo import normalizer
from grpo_cli.core.rl.update import Objective, update

SEQUENCES = Sequences([[5, 6, 7], [8, 9]], [[10, 11, 12], [13, 14], [15, 16, 17, 18], [19, 20]], [0, 0, 1, 1])
ADVANTAGES = torch.tensor([0.9, -0.4, 0.0, 0.3])


def trained(policy: Policy, loss: Loss, inner: int, reference: torch.Tensor | None) -> tuple[dict[str, float], Any]:
    """The metrics of an update, and the log-probabilities of every inner update; rows without a gradient are 0."""
    seen = [torch.zeros(4, 4) for _ in range(inner)]

    def watch(number: int, rows: list[int], logprobs: torch.Tensor) -> None:
        seen[number][rows, : logprobs.shape[1]] = logprobs

    metrics = update(
        policy,
        torch.optim.AdamW(policy.trainable, lr=3e-4),
        Examples(SEQUENCES, ADVANTAGES, (), reference),
        Objective(loss, TEMPERATURE, MAX_NEW_TOKENS, inner),
        micro_batch=MicroBatch(3),
        watch=watch,
    )
    return metrics, seen


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_terms_add_up_to_the_logged_loss(tiny_policy: Policy, loss_type: str, beta: float, inner: int) -> None:
    loss, mask = a_loss(loss_type, beta=beta), SEQUENCES.mask()
    torch.manual_seed(1)
    reference = -3 - torch.rand(4, 4) * mask if beta else None
    metrics, seen = trained(tiny_policy, loss, inner, reference)
    weight = normalizer(mask.sum(dim=1), loss_type=loss_type, max_new_tokens=MAX_NEW_TOKENS)
    parts = [terms(own, seen[0], reference, ADVANTAGES, mask, weight, loss) for own in seen]
    assert sum(part.loss for part in parts) / inner == pytest.approx(metrics["loss"], abs=1e-6)
    assert metrics["loss"] != 0 or (beta == 0 and inner == 1)
    clipped = sum(float(part.clipped.sum()) for part in parts) / inner / int(mask.sum())
    assert clipped == pytest.approx(metrics["clip_fraction"])
    for part in parts:
        assert float(part.share.sum()) == pytest.approx(float(part.coefficient.any()))
        assert not part.contribution[~mask].any() and not part.share[~mask].any()


def test_a_token_by_hand() -> None:
    # grpo, one row of two tokens: weight 1/2; ratio exp(0.1), A = 2, no clip below 1.2: -2 * 1.105171 / 2
    loss, mask = a_loss(beta=0.5), torch.tensor([[True, True]])
    logprobs, old, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.1, -2.0]]), torch.tensor([[-1.0, -1.0]])
    part = terms(logprobs, old, reference, torch.tensor([2.0]), mask, torch.tensor([0.5]), loss)
    kl = math.e - 2  # exp(1) - 1 - 1
    assert part.contribution[0].tolist() == pytest.approx([-math.exp(0.1), -1 + 0.25 * kl])
    # derivative: -A * ratio / 2, and -A / 2 + 0.5 * (1 - exp(1)) / 2
    assert part.coefficient[0].tolist() == pytest.approx([-math.exp(0.1), -1 + 0.25 * (1 - math.e)])
    # the pushes are these times 1 - exp(-1) and 1 - exp(-2)
    one, other = -math.exp(0.1) * (1 - math.exp(-1)), (-1 + 0.25 * (1 - math.e)) * (1 - math.exp(-2))
    assert part.share[0].tolist() == pytest.approx([one / (one + other), other / (one + other)])
    assert part.ratio[0].tolist() == pytest.approx([math.exp(0.1), 1.0])
    assert part.loss == pytest.approx(-math.exp(0.1) - 1 + 0.25 * kl)


FORKS = [
    # Six of eight give up with token 9 after 1 2, two go on with 3.
    ([[1, 2, 9]] * 6 + [[1, 2, 3, 4], [1, 2, 3, 5]], [-0.2] * 6 + [0.6] * 2, (2, 3, [6, 7], 9, [0, 1, 2, 3, 4, 5])),
    # One wrong completion leaves at once; the others part later: the later fork says more.
    ([[7], [1, 2, 9], [1, 2, 9], [1, 2, 3], [1, 2, 3]], [-1, -1, -1, 1, 1], (2, 3, [3, 4], 9, [1, 2])),
    # The first token already says it all.
    ([[1, 5], [2, 5], [2, 6]], [1, -0.5, -0.5], (0, 1, [0], 2, [1, 2])),
    # A completion that ends is a branch.
    ([[1, 2], [1, 2, 3]], [1, -1], (2, None, [0], 3, [1])),
]


@pytest.mark.parametrize(("completions", "gains", "expected"), FORKS)
def test_a_group_forks_where_better_and_worse_completions_part(
    completions: list[list[int]], gains: list[float], expected: tuple[Any, ...]
) -> None:
    found = fork(completions, gains)
    assert found is not None
    position, token, better, other, worse = expected
    assert (found.position, found.better, found.worse) == (position, Branch(token, better), Branch(other, worse))


@pytest.mark.parametrize("gains", [[0.0, 0.0], [1.0, 1.0]])
def test_a_group_without_better_and_worse_has_no_fork(gains: list[float]) -> None:
    assert fork([[1, 2], [1, 3]], gains) is None


def test_equal_completions_have_no_fork() -> None:
    assert fork([[1, 2], [1, 2]], [1.0, -1.0]) is None


def test_variants_differ_from_the_run_in_one_setting() -> None:
    found = variants(a_loss("dapo", beta=0.1))
    assert found[OWN] == a_loss("dapo", beta=0.1)
    assert len(found) == 1 + 4 + 3 + 4
    assert found["loss_type gspo"].loss_type == "gspo" and found["loss_type gspo"].beta == 0.1
    assert not any(name.startswith("kl") for name in variants(a_loss("dapo")))
