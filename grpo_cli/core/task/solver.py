"""Every distinct solution of a puzzle, and one solution quickly. Arithmetic is exact: values are reduced fractions."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import combinations
from math import gcd
from typing import NamedTuple

from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import OPERATIONS, ORIGINAL, Rules

Value = tuple[int, int]  # numerator and denominator, reduced; never negative
_Side = tuple[tuple[int, ...], Value]

_cached = lru_cache(maxsize=1 << 13)

TABLED = 4  # up to so many numbers, a table of all values is quicker than a search for each goal
FORMED = 3  # up to so many, a table of all forms
LISTED = 4  # up to so many numbers with division, `solution` is the shortest of all; of more, the first found


def solve(puzzle: Puzzle, rules: Rules = ORIGINAL) -> list[str]:
    """All distinct solutions with as few parentheses as can be, the shortest first; empty if there is none.

    Solutions are distinct if they are distinct rational functions of the puzzle's numbers: neither the order and the
    grouping of sums and products matters, nor where minus signs stand. Of `(2 - 4) * (3 - 5)` and `(4 - 2) * (5 - 3)`,
    the one whose factors are not negative is listed; of `2 + (3 - 3) * 5` and `2 - (3 - 3) * 5`, the first.
    """
    return list(_solutions(tuple(sorted(puzzle.numbers)), puzzle.target, rules.operations, rules.use_all))


def solution(puzzle: Puzzle, rules: Rules = ORIGINAL) -> str | None:
    """The shortest solution, or of many numbers with division the first that is found; None if there is none."""
    numbers = tuple(sorted(puzzle.numbers))
    if len(numbers) <= LISTED or "/" not in rules.operations:
        return next(iter(_solutions(numbers, puzzle.target, rules.operations, rules.use_all)), None)
    for chosen in _choices(numbers, rules.use_all):
        if form := _first(chosen, (puzzle.target, 1), rules.operations):
            return _text(form.plus, form.minus)
    return None


def needs_parentheses(puzzle: Puzzle, rules: Rules = ORIGINAL) -> bool:
    """Whether no solution is free of parentheses."""
    return all("(" in text for text in solve(puzzle, rules))


def targets(numbers: Iterable[int], rules: Rules = ORIGINAL) -> set[int]:
    """The whole values within the rules' targets that `numbers` can make."""
    made = (values(chosen, rules.operations) for chosen in _choices(tuple(sorted(numbers)), rules.use_all))
    return {top for part in made for top, bottom in part if bottom == 1 and top in rules.targets}


def _choices(numbers: tuple[int, ...], use_all: bool) -> list[tuple[int, ...]]:
    """The numbers to use: all of them, or any of them, most first."""
    sizes = [len(numbers)] if use_all else range(len(numbers), 0, -1)
    return [chosen for size in sizes for chosen in sorted(set(combinations(numbers, size)))]


class _Form(NamedTuple):
    """A canonical expression: as a sum of ordered terms, and as a product of ordered `factors` over `divisors`."""

    value: Value
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    factors: tuple[str, ...]
    divisors: tuple[str, ...] = ()


def _text(plus: tuple[str, ...], minus: tuple[str, ...]) -> str:
    return " - ".join((" + ".join(plus), *minus))


def _ordered(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Compound parts first, then numbers upwards."""
    return tuple(sorted(parts, key=lambda part: (part.isdigit(), len(part), part)))


def _number(number: int) -> _Form:
    return _Form((number, 1), (str(number),), (), (str(number),))


@_cached
def _is_zero(term: str) -> bool:
    expression = parse(term, OPERATIONS) if "(" in term else None
    return expression is not None and expression.value == 0


def _sum(value: Value, plus: tuple[str, ...], minus: tuple[str, ...]) -> _Form:
    """The sum of terms. A term worth zero is added, never subtracted; a sum worth zero stands for its negative too."""
    zeros = tuple(term for term in minus if _is_zero(term))
    plus, minus = _ordered(plus + zeros), _ordered(tuple(term for term in minus if term not in zeros))
    if value[0] == 0 and (len(plus), plus) < (len(minus), minus):
        plus, minus = minus, plus
    return _Form(value, plus, minus, (f"({_text(plus, minus)})",))


def _product(value: Value, factors: tuple[str, ...], divisors: tuple[str, ...]) -> _Form:
    factors, divisors = _ordered(factors), _ordered(divisors)
    return _Form(value, (" / ".join((" * ".join(factors), *divisors)),), (), factors, divisors)


def _joined(left: _Form, right: _Form, operations: str, goal: Value | None = None) -> Iterator[_Form]:
    """The forms that join two, each if worth `goal`: sum, difference that is not negative, product, both quotients."""
    if left.value[0] * right.value[1] < right.value[0] * left.value[1]:
        left, right = right, left
    for operation, value in _results(left.value, right.value, operations):
        if goal is not None and value != goal:
            continue
        if operation == "+":
            yield _sum(value, left.plus + right.plus, left.minus + right.minus)
        elif operation == "-":
            yield _sum(value, left.plus + right.minus, left.minus + right.plus)
        elif operation == "*":
            yield _product(value, left.factors + right.factors, left.divisors + right.divisors)
        elif operation == "/":
            yield _product(value, left.factors + right.divisors, left.divisors + right.factors)
        else:
            yield _product(value, left.divisors + right.factors, left.factors + right.divisors)


def _results(a: Value, b: Value, operations: str) -> list[tuple[str, Value]]:
    """What two values can make, with the operation; `\\` is `/` with its sides exchanged."""
    (an, ad), (bn, bd) = a, b
    across, back, bottom = an * bd, bn * ad, ad * bd
    made = []
    if "+" in operations:
        made.append(("+", _reduced(across + back, bottom)))
    if "-" in operations:
        made.append(("-", _reduced(abs(across - back), bottom)))
    if "*" in operations:
        made.append(("*", _reduced(an * bn, bottom)))
    if "/" in operations:
        if bn:
            made.append(("/", _reduced(across, back)))
        if an:
            made.append(("\\", _reduced(back, across)))
    return made


def _reduced(top: int, bottom: int) -> Value:
    if bottom == 1:
        return top, 1
    divisor = gcd(top, bottom)
    return top // divisor, bottom // divisor


@_cached
def _solutions(numbers: tuple[int, ...], target: int, operations: str, use_all: bool) -> tuple[str, ...]:
    forms = (form for chosen in _choices(numbers, use_all) for form in _forms(chosen, (target, 1), operations))
    texts = {_text(form.plus, form.minus) for form in forms}
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
def values(numbers: tuple[int, ...], operations: str) -> frozenset[Value]:
    """The absolute values of all expressions of sorted `numbers`: with a - b goes b - a, so a sign is never missing."""
    if len(numbers) == 1:
        return frozenset({(numbers[0], 1)})
    return frozenset(
        value
        for one, other in _splits(numbers)
        for a in values(one, operations)
        for b in values(other, operations)
        for _, value in _results(a, b, operations)
    )


@_cached
def _makes(numbers: tuple[int, ...], goal: Value, operations: str) -> bool:
    """Whether an expression of sorted `numbers` is worth `goal` or its negative."""
    if len(numbers) <= TABLED:
        return goal in values(numbers, operations)
    return any(True for _ in _ways(numbers, goal, operations))


def _ways(numbers: tuple[int, ...], goal: Value, operations: str) -> Iterator[tuple[_Side, _Side]]:
    """The pairs of sides, each some of the numbers and their value, that can be joined to `goal`."""
    for one, other in _splits(numbers):
        for value in values(one, operations):
            if value[0] == goal[0] == 0 and "*" in operations:
                partners: Iterable[Value] = values(other, operations)
            else:
                partners = _partners(value, goal, operations)
            yield from (((one, value), (other, partner)) for partner in partners if _makes(other, partner, operations))


def _partners(value: Value, goal: Value, operations: str) -> set[Value]:
    """The values that give `goal` when joined with `value`, where not both are zero."""
    (top, bottom), (goal_top, goal_bottom) = value, goal
    across, back, below = goal_top * bottom, top * goal_bottom, bottom * goal_bottom
    partners = set()
    if "+" in operations and across >= back:
        partners.add(_reduced(across - back, below))
    if "-" in operations:
        partners.add(_reduced(across + back, below))
        if back >= across:
            partners.add(_reduced(back - across, below))
    if "*" in operations and top:
        partners.add(_reduced(across, back))
    if "/" in operations and top:
        partners.add(_reduced(goal_top * top, below))
        if goal_top:
            partners.add(_reduced(back, across))
    return partners


@_cached
def _all_forms(numbers: tuple[int, ...], operations: str) -> dict[Value, list[_Form]]:
    """The canonical forms of sorted `numbers`, by value."""
    if len(numbers) == 1:
        return {(numbers[0], 1): [_number(numbers[0])]}
    forms = {
        form
        for one, other in _splits(numbers)
        for lefts in _all_forms(one, operations).values()
        for left in lefts
        for rights in _all_forms(other, operations).values()
        for right in rights
        for form in _joined(left, right, operations)
    }
    by_value: dict[Value, list[_Form]] = {}
    for form in forms:
        by_value.setdefault(form.value, []).append(form)
    return by_value


@_cached
def _forms(numbers: tuple[int, ...], goal: Value, operations: str) -> frozenset[_Form]:
    """The canonical forms of sorted `numbers` worth `goal`."""
    if len(numbers) <= FORMED:
        return frozenset(_all_forms(numbers, operations).get(goal, ()))
    return frozenset(
        form
        for (one, value), (other, partner) in _ways(numbers, goal, operations)
        for left in _forms(one, value, operations)
        for right in _forms(other, partner, operations)
        for form in _joined(left, right, operations, goal)
    )


def _first(numbers: tuple[int, ...], goal: Value, operations: str) -> _Form | None:
    """A canonical form of sorted `numbers` worth `goal`, if there is one."""
    if len(numbers) == 1:
        return _number(numbers[0]) if goal == (numbers[0], 1) else None
    for (one, value), (other, partner) in _ways(numbers, goal, operations):
        left, right = _first(one, value, operations), _first(other, partner, operations)
        if left and right:
            return next(_joined(left, right, operations, goal))
    return None
