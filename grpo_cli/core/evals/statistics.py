"""Statistics of solved puzzles: the interval of a share, and exact tests of a difference.

Standard library only, so a report does not need torch.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean, stdev

Z = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
SIGNIFICANT = 0.05
NOT_SIGNIFICANT = "not significant"


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share of `count` trials (Wilson 1927)."""
    spread = Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered(shares: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of the mean of `shares`, each of `samples` completions of one puzzle, which are not independent.

    Wilson's, with as many trials as independent ones of the same variance: variance p (1 - p) / n of the mean is that
    between puzzles, s^2 / puzzles (Kish 1965: the design effect). At least one trial per puzzle, at most `samples`.
    """
    count, mean = len(shares), fmean(shares)
    if count == 1 or mean in (0, 1):
        return wilson(mean, count)
    between = stdev(shares) ** 2 / count
    trials = mean * (1 - mean) / between if between else math.inf
    return wilson(mean, min(max(trials, count), count * samples))


def mcnemar(gained: int, lost: int) -> float:
    """p-value of McNemar's exact, two-sided test (1947) for these numbers of gains and losses."""
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, float(Fraction(2 * tail, 1 << changed)))


def changes(first: str, second: str) -> tuple[int, int]:
    """Puzzles gained and lost between two records of solved puzzles, one character per puzzle, "1" if solved."""
    pairs = Counter(zip(first, second, strict=True))
    return pairs["0", "1"], pairs["1", "0"]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap(values: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of independent runs, by resampling them (Agarwal et al. 2021)."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def student(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t with whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3, 26.7.4)."""
    angle, odd = math.atan(abs(t) / math.sqrt(freedom)), freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for order in range(1, (freedom - odd) // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * (2 * order - 1 + odd) / (2 * order + odd)
    inside = math.sin(angle) * total
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if odd else inside))


def student_quantile(p_value: float, freedom: int) -> float:
    """The t whose two-sided p-value this is, by bisection."""
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) > p_value else (low, middle)
    return low


def paired(differences: Sequence[float]) -> tuple[tuple[float, float], float]:
    """95 % interval of the mean of paired differences, and the p-value that it is 0, by Student's t (1908)."""
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    half = student_quantile(SIGNIFICANT, len(differences) - 1) * error
    p_value = student(mean / error, len(differences) - 1) if error else float(mean == 0)
    return (mean - half, mean + half), p_value


def significant(p_value: float) -> bool:
    """Whether p is below the significance level of the project."""
    return p_value < SIGNIFICANT
