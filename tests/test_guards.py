"""Signs of a training that has gone wrong for good, and what the loop does about them."""

from typing import cast

import pytest

from grpo_cli.core.guards import WINDOW, collapses

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
