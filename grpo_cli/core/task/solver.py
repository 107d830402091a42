"""All distinct solutions of a puzzle, or one solution quickly. Arithmetic is exact, over reduced fractions.

`values` tabulates the values of each small set of numbers. Larger sets are searched backwards from the goal: split the
numbers in two, and for each value of the smaller side look up the value needed from the other side.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import combinations
from math import gcd
from typing import NamedTuple

from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import ORIGINAL, Rules

Numbers = tuple[int, ...]  # sorted
Value = tuple[int, int]  # numerator and denominator, reduced; never negative
Way = tuple[str, Value, Value]  # an operation and the values of its sides
Term = tuple[bool, int, str, bool]  # is a number, length, text, is worth zero: sorts compound terms first, by length

TABLED = 4  # up to this many numbers, a table of all values is faster than a search
SHORTEST = 4  # up to this many numbers, `solution` is the shortest
# `~` and `\` are `-` and `/` with exchanged sides.
_EXCHANGED = {"+": "+", "*": "*", "-": "~", "~": "-", "/": "\\", "\\": "/"}

_cached = lru_cache(maxsize=1 << 12)


def solve(puzzle: Puzzle, rules: Rules = ORIGINAL) -> list[str]:
    """All distinct solutions with as few parentheses as possible, the shortest first; empty if there are none.

    Solutions are distinct if they are distinct rational functions of the puzzle's numbers: neither the order and
    grouping of sums and products nor the placement of minus signs matters. Of `(2 - 4) * (3 - 5)` and
    `(4 - 2) * (5 - 3)` only the second is listed, whose factors are not negative; of `2 + (3 - 3) * 5` and
    `2 - (3 - 3) * 5` only the first.
    """
    return list(_solutions(tuple(sorted(puzzle.numbers)), puzzle.target, rules.operations, rules.use_all))


def solution(puzzle: Puzzle, rules: Rules = ORIGINAL) -> str | None:
    """A solution, the shortest for up to SHORTEST numbers; None if there is none."""
    numbers = tuple(sorted(puzzle.numbers))
    if len(numbers) <= SHORTEST:
        return next(iter(_solutions(numbers, puzzle.target, rules.operations, rules.use_all)), None)
    tried = (_first(chosen, (puzzle.target, 1), rules.operations) for chosen in _choices(numbers, rules.use_all))
    return next((form.text for form in tried if form), None)


def targets(numbers: Iterable[int], rules: Rules = ORIGINAL) -> set[int]:
    """The whole values within the rules' targets that `numbers` can make."""
    made = (values(chosen, rules.operations) for chosen in _choices(tuple(sorted(numbers)), rules.use_all))
    return {top for part in made for top, bottom in part if bottom == 1 and top in rules.targets}


def _choices(numbers: Numbers, use_all: bool) -> list[Numbers]:
    """The numbers to use: all of them, or every selection, largest first."""
    sizes = [len(numbers)] if use_all else range(len(numbers), 0, -1)
    return [chosen for size in sizes for chosen in sorted(set(combinations(numbers, size)))]


@lru_cache(maxsize=512)  # a table of four numbers takes about 0.5 MB
def values(numbers: Numbers, operations: str) -> frozenset[Value]:
    """The absolute values of all expressions; signs are not needed, because a - b implies b - a."""
    if len(numbers) == 1:
        return frozenset({(numbers[0], 1)})
    subtracts, multiplies, divides = ("-" in operations, "*" in operations, "/" in operations)
    made = set()
    for one, rest in _splits(numbers):
        for a, b in values(one, operations):
            for c, d in values(rest, operations):
                left, right, below = a * d, c * b, b * d
                if "+" in operations:
                    made.add((left + right, below))
                if subtracts:
                    made.add((abs(left - right), below))
                if multiplies:
                    made.add((a * c, below))
                if divides and right:
                    made.add((left, right))
                if divides and left:
                    made.add((right, left))
    return frozenset((top // (common := gcd(top, bottom)), bottom // common) for top, bottom in made)


@_cached
def _splits(numbers: Numbers) -> tuple[tuple[Numbers, Numbers], ...]:
    """The ways to split numbers into a side with the first number, and the rest."""
    splits = set()
    for size in range(len(numbers) - 1):
        for chosen in combinations(range(1, len(numbers)), size):
            rest = tuple(number for index, number in enumerate(numbers) if index and index not in chosen)
            splits.add(((numbers[0], *(numbers[index] for index in chosen)), rest))
    return tuple(sorted(splits))


def _ways(one: Numbers, rest: Numbers, goal: Value, operations: str, allowed: str) -> Iterator[Way]:
    """How an allowed operation makes `goal` from the two sides, whose own expressions use any of `operations`."""
    exchanged = len(one) > len(rest)
    small, large = (rest, one) if exchanged else (one, rest)
    table = values(large, operations) if len(large) <= TABLED else None
    for value in values(small, operations):
        if value[0] == goal[0] == 0 and "*" in allowed:
            partners = [("*", other) for other in values(large, operations)]
            partners += [("/", other) for _, other in partners if other[0] and "/" in allowed]
        else:
            partners = _partners(value, goal, allowed)
        for operation, partner in partners:
            if _makes(large, partner, operations) if table is None else partner in table:
                yield (_EXCHANGED[operation], partner, value) if exchanged else (operation, value, partner)


def _partners(value: Value, goal: Value, allowed: str) -> list[tuple[str, Value]]:
    """The operations and values that make `goal` from `value`, unless both are zero and multiplied."""
    (top, bottom), (goal_top, goal_bottom) = value, goal
    whole, part, below = goal_top * bottom, top * goal_bottom, bottom * goal_bottom
    partners = []
    if "+" in allowed and whole >= part:
        partners.append(("+", _reduced(whole - part, below)))
    if "-" in allowed:
        partners.append(("~", _reduced(whole + part, below)))
        if part >= whole:
            partners.append(("-", _reduced(part - whole, below)))
    if "*" in allowed and top:
        partners.append(("*", _reduced(whole, part)))
    if "/" in allowed and top:
        partners.append(("\\", _reduced(goal_top * top, below)))
        if goal_top:
            partners.append(("/", _reduced(part, whole)))
    return partners


def _reduced(top: int, bottom: int) -> Value:
    if bottom == 1:
        return top, 1
    divisor = gcd(top, bottom)
    return top // divisor, bottom // divisor


@_cached
def _makes(numbers: Numbers, goal: Value, operations: str) -> bool:
    """Whether an expression has the value `goal` or its negative."""
    if len(numbers) <= TABLED:
        return goal in values(numbers, operations)
    return any(True for one, rest in _splits(numbers) for _ in _ways(one, rest, goal, operations, operations))


class _Form(NamedTuple):
    """A canonical expression: `plus` terms minus `minus` terms, and as part of a product `factors` over `divisors`."""

    text: str
    plus: tuple[Term, ...]
    minus: tuple[Term, ...]
    factors: tuple[Term, ...]
    divisors: tuple[Term, ...]


def _number(number: int) -> _Form:
    text = str(number)
    term = (True, len(text), text, False)
    return _Form(text, (term,), (), (term,), ())


def _sum(plus: tuple[Term, ...], minus: tuple[Term, ...], is_zero: bool) -> _Form:
    """A sum. A zero term is added, never subtracted; a zero sum also represents its negative."""
    zeros = tuple(term for term in minus if term[3])
    plus, minus = tuple(sorted(plus + zeros)), tuple(sorted(term for term in minus if not term[3]))
    if is_zero and (len(plus), _texts(plus)) < (len(minus), _texts(minus)):
        plus, minus = minus, plus
    text = " - ".join((" + ".join(_texts(plus)), *_texts(minus)))
    return _Form(text, plus, minus, ((False, len(text) + 2, f"({text})", is_zero),), ())


def _product(factors: tuple[Term, ...], divisors: tuple[Term, ...], is_zero: bool) -> _Form:
    factors, divisors = tuple(sorted(factors)), tuple(sorted(divisors))
    text = " / ".join((" * ".join(_texts(factors)), *_texts(divisors)))
    return _Form(text, ((False, len(text), text, is_zero),), (), factors, divisors)


def _texts(terms: tuple[Term, ...]) -> list[str]:
    return [term[2] for term in terms]


def _joined(operation: str, left: _Form, right: _Form, is_zero: bool) -> _Form:
    if operation == "+":
        return _sum(left.plus + right.plus, left.minus + right.minus, is_zero)
    if operation == "-":
        return _sum(left.plus + right.minus, left.minus + right.plus, is_zero)
    if operation == "*":
        return _product(left.factors + right.factors, left.divisors + right.divisors, is_zero)
    if operation == "/":
        return _product(left.factors + right.divisors, left.divisors + right.factors, is_zero)
    return _joined(_EXCHANGED[operation], right, left, is_zero)


@_cached
def _solutions(numbers: Numbers, target: int, operations: str, use_all: bool) -> tuple[str, ...]:
    chosen = _choices(numbers, use_all)
    texts = {form.text for one in chosen for form in _forms(one, (target, 1), operations)}
    return tuple(sorted(texts, key=lambda text: (len(text), text)))


def _forms(numbers: Numbers, goal: Value, operations: str) -> tuple[_Form, ...]:
    """The canonical forms with value `goal`."""
    sums = _sums(numbers, goal, operations)
    return sums if len(numbers) == 1 else sums + _products(numbers, goal, operations)


@_cached
def _sums(numbers: Numbers, goal: Value, operations: str) -> tuple[_Form, ...]:
    """The sums with value `goal`, each split into the term with the first number, and the rest."""
    return _built(numbers, goal, operations, operations.rstrip("*/"), _products)


@_cached
def _products(numbers: Numbers, goal: Value, operations: str) -> tuple[_Form, ...]:
    """The products and quotients with value `goal`, each split into the factor with the first number, and the rest."""
    return _built(numbers, goal, operations, operations.lstrip("+-"), _sums)


def _built(
    numbers: Numbers, goal: Value, operations: str, allowed: str, parts: Callable[..., tuple[_Form, ...]]
) -> tuple[_Form, ...]:
    if len(numbers) == 1:
        return (_number(numbers[0]),) if goal == (numbers[0], 1) else ()
    forms = (
        _joined(operation, left, right, goal[0] == 0)
        for one, rest in _splits(numbers)
        for operation, value, partner in _ways(one, rest, goal, operations, allowed)
        for left in parts(one, value, operations)
        for right in _forms(rest, partner, operations)
        if operation != "/" or not right.divisors  # a / (b / c) is also a * (c / b)
    )
    return tuple({form.text: form for form in forms}.values())


def _first(numbers: Numbers, goal: Value, operations: str) -> _Form | None:
    """The first form with value `goal` that the search finds, or None."""
    if len(numbers) == 1:
        return _number(numbers[0]) if goal == (numbers[0], 1) else None
    for one, rest in _splits(numbers):
        for operation, value, partner in _ways(one, rest, goal, operations, operations):
            left, right = _first(one, value, operations), _first(rest, partner, operations)
            if left and right:
                return _joined(operation, left, right, goal[0] == 0)
    return None
