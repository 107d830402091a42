"""Every distinct solution of a puzzle."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.puzzle import Puzzle

_cached = lru_cache(maxsize=1 << 11)

EXHAUSTIVE = 4  # up to so many numbers, listing every form once is faster than searching for each target


def solve(puzzle: Puzzle) -> list[str]:
    """All distinct solutions with as few parentheses as can be, the shortest first; empty if there is none.

    Solutions are distinct if they are distinct polynomials in the puzzle's numbers: neither the order and the grouping
    of sums and products matters, nor where minus signs stand. Of `(2 - 4) * (3 - 5)` and `(4 - 2) * (5 - 3)`, the one
    whose factors are not negative is listed; of `2 + (3 - 3) * 5` and `2 - (3 - 3) * 5`, the first.
    """
    return list(_solutions(tuple(sorted(puzzle.numbers)), puzzle.target))


def needs_parentheses(puzzle: Puzzle) -> bool:
    """Whether no solution is free of parentheses."""
    return all("(" in solution for solution in solve(puzzle))


class _Form(NamedTuple):
    """A canonical expression worth zero or more, as a sum of ordered terms and as a product of ordered `factors`."""

    value: int
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    factors: tuple[str, ...]


@_cached
def _is_zero(term: str) -> bool:
    expression = parse(term) if "(" in term else None
    return expression is not None and expression.value == 0


def _text(plus: tuple[str, ...], minus: tuple[str, ...]) -> str:
    return " - ".join((" + ".join(plus), *minus))


def _ordered(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Compound parts first, then numbers upwards."""
    return tuple(sorted(parts, key=lambda part: (part.isdigit(), len(part), part)))


def _number(number: int) -> _Form:
    return _Form(number, (str(number),), (), (str(number),))


def _sum(value: int, plus: tuple[str, ...], minus: tuple[str, ...]) -> _Form:
    """The sum of terms. A term worth zero is added, never subtracted; a sum worth zero stands for its negative too."""
    zeros = tuple(term for term in minus if _is_zero(term))
    plus, minus = _ordered(plus + zeros), _ordered(tuple(term for term in minus if term not in zeros))
    if value == 0 and (len(plus), plus) < (len(minus), minus):
        plus, minus = minus, plus
    return _Form(value, plus, minus, (f"({_text(plus, minus)})",))


def _add(left: _Form, right: _Form) -> _Form:
    return _sum(left.value + right.value, left.plus + right.plus, left.minus + right.minus)


def _subtract(left: _Form, right: _Form) -> _Form:
    return _sum(left.value - right.value, left.plus + right.minus, left.minus + right.plus)


def _multiply(left: _Form, right: _Form) -> _Form:
    factors = _ordered(left.factors + right.factors)
    return _Form(left.value * right.value, (" * ".join(factors),), (), factors)


@_cached
def _solutions(numbers: tuple[int, ...], target: int) -> tuple[str, ...]:
    texts = {_text(form.plus, form.minus) for form in _forms(numbers, target)}
    return tuple(sorted(texts, key=lambda text: (len(text), text)))


@_cached
def _splits(numbers: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The ways to deal sorted `numbers` out to two sides, the first never the larger."""
    splits = set()
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(range(len(numbers)), size):
            rest = tuple(number for index, number in enumerate(numbers) if index not in chosen)
            splits.add((tuple(numbers[index] for index in chosen), rest))
    return tuple(sorted(splits))


@_cached
def magnitudes(numbers: tuple[int, ...]) -> frozenset[int]:
    """The absolute values of all expressions of sorted `numbers`: with a - b goes b - a, so a sign is never missing."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset(
        value
        for one, other in _splits(numbers)
        for a in magnitudes(one)
        for b in magnitudes(other)
        for value in (a + b, abs(a - b), a * b)
    )


@_cached
def _forms(numbers: tuple[int, ...], goal: int | None = None) -> frozenset[_Form]:
    """The canonical forms of sorted `numbers` worth `goal`, or with no goal, worth anything."""
    if goal is not None and len(numbers) <= EXHAUSTIVE:
        return frozenset(form for form in _forms(numbers) if form.value == goal)
    if len(numbers) == 1:
        return frozenset({_number(numbers[0])})
    return frozenset(
        form
        for one, other in _splits(numbers)
        for left in _forms(one)
        for right in _partners(left.value, other, goal)
        for form in _joined(left, right, goal)
    )


def _partners(value: int, numbers: tuple[int, ...], goal: int | None) -> Iterator[_Form]:
    """The forms of `numbers` that can give `goal` when joined with a form worth `value`."""
    if goal is None or value == goal == 0:
        yield from _forms(numbers)
        return
    wanted = {goal - value, value - goal, goal + value}
    if value and goal % value == 0:
        wanted.add(goal // value)
    for partner in wanted & magnitudes(numbers):
        yield from _forms(numbers, partner)


def _joined(left: _Form, right: _Form, goal: int | None) -> Iterator[_Form]:
    """The sum, the difference that is not negative, and the product of two forms, each if worth `goal`."""
    if left.value < right.value:
        left, right = right, left
    if goal in (None, left.value + right.value):
        yield _add(left, right)
    if goal in (None, left.value - right.value):
        yield _subtract(left, right)
    if goal in (None, left.value * right.value):
        yield _multiply(left, right)
