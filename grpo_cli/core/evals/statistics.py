"""Statistics of solved puzzles: the interval of a share, and exact tests of a difference.

Standard library only, so that a report needs no torch.
"""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

Z = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
SIGNIFICANT = 0.05
NOT_SIGNIFICANT = "not significant"


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen in `count` trials (Wilson 1927)."""
    spread = Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """How likely so uneven a split is if gains and losses are: the exact, two-sided test of McNemar (1947)."""
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, float(Fraction(2 * tail, 1 << changed)))


def changes(first: str, second: str) -> tuple[int, int]:
    """Puzzles gained and lost between two records of who was solved, a character for each puzzle, "1" if it was."""
    pairs = Counter(zip(first, second, strict=True))
    return pairs["0", "1"], pairs["1", "0"]


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of tests that are read together, raised so that a false claim among all stays rare (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def significant(p_value: float) -> bool:
    """Whether a test rejects at the level that the whole project uses."""
    return p_value < SIGNIFICANT
