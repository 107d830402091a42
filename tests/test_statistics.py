"""Intervals and exact tests against numbers worked out by hand."""

import random
from statistics import fmean

import pytest

from grpo_cli.core.evals.statistics import changes, clustered, holm, mcnemar, wilson


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
    ("shares", "samples", "trials"),
    [
        ([1, 1, 0, 0, 0], 1, 5),
        ([1, 0.5, 0.5, 0], 4, 6),  # variance 1/6 between puzzles, 1/24 of the mean, and 1/4 of a trial
        ([1, 1, 0, 0], 4, 4),  # 1/4 over 1/12 is 3: completions of a puzzle are all alike
        ([0.75, 0.25, 0.5, 0.5], 4, 16),  # 24, more than there are
        ([0.5, 0.5, 0.5], 2, 6),
        ([1, 1, 1], 8, 3),
        ([0.25], 4, 1),
    ],
)
def test_an_interval_of_several_samples_counts_independent_trials(
    shares: list[float], samples: int, trials: int
) -> None:
    assert clustered(shares, samples) == pytest.approx(wilson(fmean(shares), trials))


@pytest.mark.parametrize("shape", [0.3, 2, 50])
def test_an_interval_of_several_samples_covers_the_truth_95_times_of_100(shape: float) -> None:
    """Puzzles from those that are either solved or not, to those that are alike."""
    rng, puzzles, samples, repeats = random.Random(0), 60, 8, 1000
    covered = 0
    for _ in range(repeats):
        chances = [rng.betavariate(shape, shape) for _ in range(puzzles)]
        shares = [sum(rng.random() < chance for _ in range(samples)) / samples for chance in chances]
        low, high = clustered(shares, samples)
        covered += low <= 0.5 <= high
    assert 0.935 < covered / repeats < 0.97


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
