"""Intervals and exact tests against numbers worked out by hand."""

import pytest

from grpo_cli.core.evals.statistics import changes, holm, mcnemar, wilson


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 0.0625),  # 2 / 32
        (6, 0, 0.03125),
        (0, 6, 0.03125),
        (8, 2, 0.109375),  # 2 * (1 + 10 + 45) / 1024
        (3, 3, 1.0),  # 2 * 42 / 64, capped
        (180, 3, 1.66651e-49),  # 2 * (1 + 183 + 16653 + 1004731) / 2**183
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p_value, rel=1e-3)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [
        (0.5, 10, 0.236593, 0.763407),
        (0.0, 10, 0.0, 0.277533),
        (1.0, 10, 0.722467, 1.0),
        (0.8, 327, 0.753274, 0.839759),
    ],
)
def test_wilson_interval(share: float, count: int, low: float, high: float) -> None:
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04], [0.02, 0.04]),
        ([0.04, 0.01, 0.03], [0.06, 0.03, 0.06]),  # 0.01 * 3, 0.03 * 2, then at least that
        ([0.5, 0.9, 0.6], [1.0, 1.0, 1.0]),
    ],
)
def test_holm_by_hand(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def test_changes_are_counted_puzzle_by_puzzle() -> None:
    assert changes("0011", "0101") == (1, 1)
    assert changes("000000", "111110") == (5, 0)
    with pytest.raises(ValueError):
        changes("0", "01")
