"""Signs of a training that has gone wrong for good, or is not healthy, each just below its limit and just above."""

from typing import Any, cast

import pytest
from test_grpo import a_loss

from grpo_cli.core.rl.health import WINDOW, collapses, flipped, warnings

GOOD = {"kl": 0.02, "truncated": 0.05, "format_rate": 1.0, "accuracy": 0.4}


def history(late: dict[str, float], early: dict[str, float] | None = None) -> list[dict[str, float]]:
    return [{**GOOD, **(early or {})}] * WINDOW + [{**GOOD, **late}] * WINDOW


@pytest.mark.parametrize(
    ("late", "early", "signs"),
    [
        ({}, {}, set()),
        ({"kl": 1.5}, {}, {"kl"}),
        ({"kl": 0.9}, {}, set()),
        ({"truncated": 0.95}, {}, {"length"}),
        ({"truncated": 0.95}, {"truncated": 0.9}, set()),  # it was like that from the start
        ({"accuracy": 0.0}, {}, {"format"}),
        ({"accuracy": 0.0, "format_rate": 0.5}, {}, set()),
        ({"accuracy": 0.0, "kl": 7.0, "truncated": 1.0}, {}, {"format", "kl", "length"}),
    ],
)
def test_signs_of_collapse(late: dict[str, float], early: dict[str, float], signs: set[str]) -> None:
    assert collapses(history(late, early)).keys() == signs


def test_a_single_spike_or_a_short_history_is_no_collapse() -> None:
    assert collapses([*history({}), {**GOOD, "kl": 100.0}]) == {}
    assert collapses([{**GOOD, "kl": 100.0, "accuracy": 0.0}] * (WINDOW - 1)) == {}
    assert collapses([]) == {}


def test_a_training_without_a_reference_has_no_kl_to_run_away() -> None:
    lines = [cast("dict[str, float]", {k: v for k, v in line.items() if k != "kl"}) for line in history({})]
    assert collapses(lines) == {}


def test_one_right_answer_is_enough_to_learn_from() -> None:
    assert collapses([*history({"accuracy": 0.0}), {**GOOD, "accuracy": 0.01}]) == {}


HEALTHY = {
    "accuracy": 0.4, "lenient_accuracy": 0.42, "format_rate": 1.0, "kl": 0.02, "logprob_gap": 3e-4,
    "zero_variance": 0.6, "truncated": 0.05, "entropy": 0.2, "weights_changed": 0.99, "cheat/numbers": 0.02,
    "cheat/not_arithmetic": 0.0, "cheat/no_thought": 0.0,
}  # fmt: skip


def told(late: dict[str, float], early: dict[str, float] | None = None) -> dict[str, str]:
    return warnings([{**HEALTHY, **(early or {})}] * WINDOW + [{**HEALTHY, **late}] * WINDOW)


@pytest.mark.parametrize(
    ("late", "early", "sign", "says"),
    [
        ({"logprob_gap": 0.149}, {}, None, ""),
        ({"logprob_gap": 0.151}, {}, "gap", "0.15 nats per token"),
        ({"zero_variance": 0.89}, {}, None, ""),
        ({"zero_variance": 0.91}, {}, "settled", "91% of the groups"),
        ({"zero_variance": 0.91, "accuracy": 0.89}, {}, "settled", "always solved or never"),
        ({"zero_variance": 0.91, "accuracy": 0.97}, {}, "right", "97% of the completions"),
        ({"zero_variance": 0.91, "accuracy": 0.11}, {}, "settled", "--num-generations"),
        ({"zero_variance": 0.91, "accuracy": 0.09}, {}, "wrong", "fewer `--numbers`"),
        ({"truncated": 0.29}, {"truncated": 0.29}, None, ""),
        ({"truncated": 0.31}, {"truncated": 0.31}, "truncated", "31% of the completions"),
        ({"truncated": 0.95}, {"truncated": 0.95}, "truncated", "--max-new-tokens"),
        ({"truncated": 0.95}, {}, None, ""),  # a collapse, which has its own sentence
        ({"entropy": 0.0099}, {}, "entropy", "from 0.2 to 0.0099 nats"),
        ({"entropy": 0.0099, "clip_fraction": 0.002}, {}, "clipped", "raise `--epsilon-high`"),
        ({"entropy": 0.0099, "clip_fraction": 0.0009}, {}, "entropy", "hardly differ"),
        ({"clip_fraction": 0.2}, {}, None, ""),  # clipping alone is no fault
        ({"entropy": 0.0101}, {}, None, ""),  # small against the start, not by itself
        ({"entropy": 0.0041}, {"entropy": 0.04}, None, ""),  # small by itself, not against the start
        ({"entropy": 0.0039}, {"entropy": 0.04}, "entropy", "accuracy of 40%"),
        ({"entropy": 0.0039, "accuracy": 0.91}, {"entropy": 0.04}, None, ""),  # rightly sure
        ({"weights_changed": 0.11}, {}, None, ""),
        ({"weights_changed": 0.031}, {}, "moved", "3.1% of the weights"),
        ({"weights_changed": 0.0, "zero_variance": 1.0}, {}, "settled", ""),  # there was nothing to move for
        ({"lenient_accuracy": 0.49}, {}, None, ""),
        ({"lenient_accuracy": 0.52}, {}, "notation", "52% of the completions"),
        ({"reward_margin": 0.04, "reward": 0.7}, {}, None, ""),
        ({"reward_margin": 0.03, "reward": 0.7}, {}, "margin", "earn 0.03 more than wrong ones"),
        ({"reward_margin": -0.5, "reward": -1.0}, {}, "margin", "earn -0.5 more"),  # a penalty for being right
        ({"reward_margin": 0.0, "reward": 1.0, "zero_variance": 1.0}, {}, "margin", "check `--reward`"),
        ({"reward_margin": 0.0, "reward": 1.0, "zero_variance": 1.0, "accuracy": 0.95}, {}, "margin", ""),
        ({"truncated": 1.0, "zero_variance": 1.0, "accuracy": 0.0}, {"truncated": 1.0}, "truncated", "100%"),
        ({"format_rate": 0.9}, {"format_rate": 0.6}, "trap", "(60% -> 90%) and the task was not (40% -> 40%)"),
        ({"format_rate": 0.9, "accuracy": 0.5}, {"format_rate": 0.6}, None, ""),
        ({"format_rate": 0.79}, {"format_rate": 0.6}, None, ""),
        ({"cheat/numbers": 0.09}, {}, None, ""),
        ({"cheat/numbers": 0.11}, {}, "cheat/numbers", "11% of the completions reach the target"),
        ({"cheat/numbers": 0.11}, {"cheat/numbers": 0.06}, None, ""),  # common, but not growing much
        ({"cheat/not_arithmetic": 0.11}, {}, "cheat/not_arithmetic", "not an expression into the answer, 0% at first"),
        ({"cheat/no_thought": 0.11}, {}, "cheat/no_thought", "without the thought"),
    ],
)
def test_signs_of_bad_health(late: dict[str, float], early: dict[str, float], sign: str | None, says: str) -> None:
    alike = {"lenient_accuracy": late.get("accuracy", HEALTHY["accuracy"])}
    found = told({**alike, **late}, early)
    assert found.keys() == ({sign} if sign else set())
    assert says in "".join(found.values())


def test_what_a_collapse_says_is_not_said_again() -> None:
    never = {"accuracy": 0.0, "lenient_accuracy": 0.0, "zero_variance": 1.0}
    assert collapses([{**HEALTHY, **never}] * WINDOW).keys() == {"format"}
    assert told(never) == {}


def test_health_needs_a_whole_window_and_the_metrics_that_it_judges() -> None:
    assert warnings([{**HEALTHY, "logprob_gap": 1.0, "truncated": 1.0}] * (WINDOW - 1)) == {}
    assert warnings([{"step": 1.0}] * WINDOW) == {}
    assert "failed for 50.0% of the completions" in warnings([{**HEALTHY, "reward/failed": 0.5}])["failed"]
    updated_once = {key: value for key, value in HEALTHY.items() if key != "entropy"}
    assert warnings([HEALTHY] * WINDOW + [updated_once] * WINDOW) == {}


# Means of five steps each of a training from 44 % to 98 % of the val puzzles.
LEARNING = {
    "accuracy": (0.380, 0.363, 0.644, 0.795, 0.941, 0.945, 0.967, 0.992),
    "zero_variance": (0.675, 0.600, 0.588, 0.425, 0.775, 0.863, 0.838, 0.938),
    "entropy": (0.01352, 0.01469, 0.00879, 0.00498, 0.00258, 0.00202, 0.00177, 0.00117),
    "logprob_gap": (4.8e-4, 3.8e-4, 2.4e-4, 1.1e-4, 3.3e-5, 2.9e-5, 3.7e-5, 1.3e-5),
    "weights_changed": (0.9957, 0.9986, 0.9996, 0.9995, 0.9995, 0.9993, 0.9991, 0.9992),
    "kl": (0.0002, 0.0039, 0.0123, 0.0343, 0.0205, 0.0231, 0.0183, 0.0226),
}


def learning() -> list[dict[str, float]]:
    means = [dict(zip(LEARNING, values, strict=True)) for values in zip(*LEARNING.values(), strict=True)]
    return [{**HEALTHY, **mean, "lenient_accuracy": mean["accuracy"]} for mean in means for _ in range(5)]


def test_a_training_that_learns_is_healthy_at_every_step_and_told_when_nothing_is_left() -> None:
    history = learning()
    assert [warnings(history[: step + 1]) for step in range(len(history))] == [{}] * 40
    longer = warnings([*history, *history[-5:] * 3])
    assert longer.keys() == {"right"}
    assert "nothing is left to learn" in longer["right"] and "stop" in longer["right"]


def kept(rewards: list[float], lengths: list[int], *, sign: int = 1) -> list[dict[str, Any]]:
    """A group without std scaling, as groups.jsonl.gz has it."""
    mean = sum(rewards) / len(rewards)
    return [
        {
            "completions": [
                {"reward": reward, "advantage": sign * (reward - mean), "length": length}
                for reward, length in zip(rewards, lengths, strict=True)
            ]
        }
    ]


# Rewards 1 and 0 of 30 and 10 tokens, advantages 0.5 and -0.5: dapo's policy loss is -(15 - 5) / 40 = -0.25, that of
# dr_grpo at 100 tokens -(15 - 5) / 200 = -0.05, and of grpo 0. The KL term of beta 0.1 at 0.2 nats is 0.02.
SIGNS = [
    ("dapo", 0.1, 1, -0.23, 0.2, None),
    ("dapo", 0.0, 1, -0.25, None, None),
    ("dapo", 0.1, 1, -0.27, 0.2, "the KL term is subtracted"),
    ("dapo", 0.1, 1, 0.27, 0.2, "the policy loss is -0.25: its sign is flipped"),
    ("dapo", 0.0, 1, 0.25, None, "the policy loss is -0.25: its sign is flipped"),
    ("dr_grpo", 0.1, 1, -0.03, 0.2, None),
    ("dr_grpo", 0.1, 1, -0.07, 0.2, "the KL term is subtracted"),
    ("dr_grpo", 0.0, 1, 0.05, None, "its sign is flipped"),
    ("grpo", 0.1, 1, 0.021, 0.2, None),  # weighted by sequence, the KL term differs from beta times the mean
    ("grpo", 0.1, 1, -0.021, 0.2, "the KL term is subtracted"),
    ("gspo", 0.1, 1, -0.02, 0.2, "the KL term is subtracted"),
    ("grpo", 0.0, 1, 1e-8, None, None),
    ("cispo", 0.1, 1, -9.0, 0.2, None),  # its loss needs log-probabilities
    ("dapo", 0.1, 1, -0.23, -0.2, "the KL is -0.2 nats per token"),
    ("dapo", 0.1, -1, 0.27, 0.2, "advantages fall where rewards rise"),
    ("cispo", 0.1, 1, 0.0, -0.2, "its sign is flipped"),
]


@pytest.mark.parametrize(("loss_type", "beta", "sign", "value", "kl", "words"), SIGNS)
def test_a_flipped_sign_is_named(
    loss_type: str, beta: float, sign: int, value: float, kl: float | None, words: str | None
) -> None:
    line = {"step": 3.0, "loss": value, **({} if kl is None else {"kl": kl})}
    found = flipped(line, kept([1.0, 0.0], [30, 10], sign=sign), a_loss(loss_type, beta=beta), max_new_tokens=100)
    assert found is None if words is None else words in str(found)


OTHERS = [
    {"kl_in": "reward"}, {"kl_estimator": "k1"}, {"mask_truncated": True}, {"entropy_share": 0.2}, {"pass_at_k": 2},
    {"entropy_bonus": 0.1}, {"sampler_correction": "mask"},
]  # fmt: skip


@pytest.mark.parametrize("change", OTHERS)
def test_the_sign_of_a_loss_with_other_terms_is_not_judged(change: dict[str, object]) -> None:
    loss, groups = a_loss("dapo", beta=0.1).model_copy(update=change), kept([1.0, 0.0], [30, 10])
    assert flipped({"step": 3.0, "loss": -0.27, "kl": 0.2}, groups, loss, max_new_tokens=100) is None


def test_a_step_without_groups_or_loss_has_no_sign_to_judge() -> None:
    assert flipped({"step": 1.0, "loss": 1.0}, [], a_loss(beta=0.1), max_new_tokens=9) is None
    assert flipped({"step": 1.0}, kept([1.0, 0.0], [3, 4]), a_loss(beta=0.1), max_new_tokens=9) is None
