"""A step taken apart: the terms of the loss add up to it, and completions fork where right and wrong part."""

import math
from collections import defaultdict
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_grpo import LOSS_TYPES, MAX_NEW_TOKENS, TEMPERATURE, a_loss

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.explain import OWN, Branch, fork, variants
from grpo_cli.core.rl.update import Objective, Terms, update

SEQUENCES = Sequences([[5, 6, 7], [8, 9]], [[10, 11, 12], [13, 14], [15, 16, 17, 18], [19, 20]], [0, 0, 1, 1])
ADVANTAGES = torch.tensor([0.9, -0.4, 0.0, 0.3])
SAMPLED = [[-4.0 - 0.3 * token / 20 for token in row] for row in SEQUENCES.completions]


def watched(
    policy: Policy, loss: Loss, reference: torch.Tensor | None = None, *, inner: int = 1, parts: int = 1
) -> tuple[dict[str, float], dict[int, list[Terms]]]:
    """The metrics of an update, and the terms of every row that has a gradient, by inner update."""
    seen: dict[int, list[Terms]] = defaultdict(list)
    metrics = update(
        policy,
        torch.optim.AdamW(policy.trainable, lr=3e-4),
        Examples(SEQUENCES, ADVANTAGES, SAMPLED, reference, truncated=[False, False, True, True]),
        Objective(loss, TEMPERATURE, MAX_NEW_TOKENS, inner, num_mini_batches=parts),
        micro_batch=MicroBatch(3),
        watch=lambda number, row, terms: seen[row].append(terms),
    )
    return metrics, seen


def total(seen: dict[int, list[Terms]], name: str) -> float:
    """The sum over tokens of the mean over inner updates, from the smallest to the largest."""
    return math.fsum(value for rows in seen.values() for terms in rows for value in getattr(terms, name)) / max(
        map(len, seen.values())
    )


WEIGHED: list[dict[str, Any]] = [
    {"mask_truncated": True},
    {"entropy_share": 0.4},
    {"entropy_bonus": 0.3},
    {"sampler_correction": "truncate", "sampler_cap": 1.1},
    {"sampler_correction": "mask", "sampler_level": "sequence", "sampler_cap": 1.05, "entropy_share": 0.6},
    {"entropy_bonus": 0.3, "entropy_share": 0.6, "mask_truncated": True},
    {"dual_clip": 1.5, "kl_estimator": "k3_unbiased"},
    {"kl_in": "reward"},
]


UPDATES = [(1, 1), (2, 1), (1, 2), (2, 2)]
PLAIN: list[tuple[Any, ...]] = [
    (loss_type, beta, *counts, {}) for loss_type in LOSS_TYPES for beta in (0.0, 0.1) for counts in UPDATES
]


@pytest.mark.parametrize(
    ("loss_type", "beta", "inner", "parts", "given"),
    [*PLAIN, *(("dapo", 0.1, *counts, given) for given in WEIGHED for counts in UPDATES[::3])],
    ids=str,
)
def test_the_terms_add_up_to_the_logged_loss(
    tiny_policy: Policy, loss_type: str, beta: float, inner: int, parts: int, given: dict[str, Any]
) -> None:
    loss, mask = a_loss(loss_type, beta=beta).model_copy(update=given), SEQUENCES.mask()
    torch.manual_seed(1)
    reference = -3 - torch.rand(4, 4) * mask if beta else None
    metrics, seen = watched(tiny_policy, loss, reference, inner=inner, parts=parts)
    assert total(seen, "loss") == pytest.approx(metrics["loss"], abs=1e-6)
    in_loss = beta * (loss.kl_in == "loss")
    for row, updates in seen.items():
        assert len(updates) == inner
        for terms in updates:
            values = zip(*(getattr(terms, one.name) for one in fields(Terms)), strict=True)
            assert len(terms.loss) == len(SEQUENCES.completions[row])
            for _, _, _, policy, factor, kl, weight, bonus, value, _ in values:
                assert value == pytest.approx(weight * (factor * policy + in_loss * kl) - bonus, abs=1e-6)
    assert not (loss.mask_truncated and {2, 3} & seen.keys())
    if parts == 1:
        clipped = total(seen, "clipped") / int(mask.sum())
        assert clipped == pytest.approx(metrics["clip_fraction"])


def test_the_push_is_the_gradient_of_the_tokens_own_logit(tiny_policy: Policy) -> None:
    """Of the loss with its entropy bonus, by the logits of the whole vocabulary."""
    loss = a_loss("dr_grpo").model_copy(update={"entropy_bonus": 0.3})
    logits = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[3, 5]])

    def logprobs(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        spread = logits.log_softmax(dim=-1)
        return spread.gather(2, tokens[..., None])[..., 0], -(spread.exp() * spread).sum(dim=-1)

    policy: Any = SimpleNamespace(logprobs=logprobs, trainable=[logits], device="cpu", is_sharded=False)
    seen: list[Terms] = []
    optimizer, gradient = torch.optim.SGD([logits], lr=0.0), torch.zeros_like(logits)

    def keep(*_: object) -> None:
        gradient.copy_(cast("torch.Tensor", logits.grad))

    optimizer.register_step_pre_hook(keep)
    update(
        policy,
        optimizer,
        Examples(Sequences([[1]], [[3, 5]], [0]), torch.tensor([0.7])),
        Objective(loss, 1.0, 2, clip_grad_norm=math.inf),
        watch=lambda number, row, terms: seen.append(terms),
    )
    assert seen[0].push == pytest.approx(gradient.gather(2, tokens[..., None]).flatten().tolist(), abs=1e-6)


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
