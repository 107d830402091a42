"""Countdown puzzles: enumerated, drawn, solved, and kept in JSON Lines; it does not know prompts, models or rewards."""

import json
import os
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from operator import add, mul, sub
from pathlib import Path
from typing import Literal, NamedTuple

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.expression import Expression, parse

Split = Literal["train", "val"]
Verdict = Literal["correct", "not_an_expression", "wrong_numbers", "wrong_value"]

SIZES = range(2, 7)
ENUMERABLE = 4  # the most numbers of which all puzzles are soon enumerated and solved
NUMBERS = range(1, 11)
TARGETS = range(1, 101)
EXHAUSTIVE = 4  # up to so many numbers, listing every form once is faster than searching for each target
FIELDS = ("numbers", "target", "split", "solution")

_cached = lru_cache(maxsize=1 << 11)


def split_of(numbers: Iterable[int]) -> Split:
    """`val` if every number is even, else `train`."""
    return "train" if any(number % 2 for number in numbers) else "val"


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Make `target` from all of `numbers`, each used once, with +, - and *."""

    numbers: tuple[int, ...]
    target: int

    @property
    def split(self) -> Split:
        """The split that the numbers belong to."""
        return split_of(self.numbers)

    @property
    def canonical(self) -> "Puzzle":
        """The same puzzle with its numbers sorted."""
        return Puzzle(tuple(sorted(self.numbers)), self.target)


def checked(numbers: Sequence[int], target: int) -> Puzzle:
    """A puzzle somebody asked for: 2 to 6 numbers from 1 to 100 and a target from 1 to 1000, or CountdownError."""
    _check_size(len(numbers))
    for number in numbers:
        if not 1 <= number <= 100:
            raise CountdownError(f"the numbers of a puzzle lie between 1 and 100, and {number} does not")
    if not 1 <= target <= 1000:
        raise CountdownError(f"the target of a puzzle lies between 1 and 1000, and {target} does not")
    return Puzzle(tuple(numbers), target)


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise CountdownError(f"a puzzle has {SIZES[0]} to {SIZES[-1]} numbers, not {size}")


def judge(puzzle: Puzzle, expression: Expression | None) -> Verdict:
    """Whether the expression solves the puzzle, or the first thing that is wrong with it."""
    if expression is None:
        return "not_an_expression"
    if sorted(expression.numbers) != sorted(puzzle.numbers):
        return "wrong_numbers"
    return "correct" if expression.value == puzzle.target else "wrong_value"


def enumerate_puzzles(numbers: int = 3, split: Split | None = None) -> Iterator[Puzzle]:
    """Every solvable puzzle of that many numbers from 1 to 10 and a target from 1 to 100, once.

    Numbers are sorted; puzzles are ordered by (numbers, target).
    """
    _check_size(numbers)
    for drawn in combinations_with_replacement(NUMBERS, numbers):
        if split in (None, split_of(drawn)):
            yield from (Puzzle(drawn, target) for target in sorted(_magnitudes(drawn)) if target in TARGETS)


def generate(count: int, *, numbers: int = 3, split: Split | None = None, seed: int = 0) -> list[Puzzle]:
    """`count` puzzles as the original draws them: `((a op b) op c) ...` at random, kept if 1 <= value <= 100."""
    _check_size(numbers)
    rng = random.Random(seed)
    puzzles: list[Puzzle] = []
    while len(puzzles) < count:
        drawn = tuple(rng.choice(NUMBERS) for _ in range(numbers))
        target = drawn[0]
        for number in drawn[1:]:
            target = rng.choice((add, sub, mul))(target, number)
        if target in TARGETS and split in (None, split_of(drawn)):
            puzzles.append(Puzzle(drawn, target))
    return puzzles


def solve(puzzle: Puzzle) -> list[str]:
    """All distinct solutions with as few parentheses as can be, the shortest first; empty if there is none.

    Solutions are distinct if they are distinct polynomials in the puzzle's numbers: neither the order and the grouping
    of sums and products matters, nor where minus signs stand. Of `(2 - 4) * (3 - 5)` and `(4 - 2) * (5 - 3)`, the one
    whose factors are not negative is listed.
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


def _text(plus: tuple[str, ...], minus: tuple[str, ...]) -> str:
    return " - ".join((" + ".join(plus), *minus))


def _ordered(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Compound parts first, then numbers upwards."""
    return tuple(sorted(parts, key=lambda part: (part.isdigit(), len(part), part)))


def _number(number: int) -> _Form:
    return _Form(number, (str(number),), (), (str(number),))


def _sum(value: int, plus: tuple[str, ...], minus: tuple[str, ...]) -> _Form:
    """The sum of terms; one worth zero equals its own negative, and stands for both."""
    plus, minus = _ordered(plus), _ordered(minus)
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
def _magnitudes(numbers: tuple[int, ...]) -> frozenset[int]:
    """The absolute values of all expressions of sorted `numbers`: with a - b goes b - a, so a sign is never missing."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset(
        value
        for one, other in _splits(numbers)
        for a in _magnitudes(one)
        for b in _magnitudes(other)
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
    for partner in wanted & _magnitudes(numbers):
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


def json_line(puzzle: Puzzle) -> str:
    """The puzzle with one solution as a line of a puzzle file, without its newline."""
    solutions = solve(puzzle)
    if not solutions:
        raise CountdownError(f"{puzzle.target} cannot be made from {list(puzzle.numbers)}")
    record = (puzzle.numbers, puzzle.target, puzzle.split, solutions[0])
    return json.dumps(dict(zip(FIELDS, record, strict=True)))


def write_puzzles(path: Path, puzzles: Iterable[Puzzle], *, overwrite: bool = False) -> None:
    """Write a puzzle file in one step: it is there as a whole or not at all."""
    text = "".join(f"{json_line(puzzle)}\n" for puzzle in puzzles)
    partial = path.parent / f"{path.name}.{os.getpid()}.part"
    try:
        if path.is_dir():
            raise CountdownError(f"cannot write `{path}`: Is a directory", "name a file in it")
        if path.exists() and not overwrite:
            raise CountdownError(f"`{path}` exists", "write elsewhere, or replace it with `--overwrite`")
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CountdownError(f"cannot write `{path}`: {error.strerror}") from error


def read_puzzles(path: Path) -> list[Puzzle]:
    """The puzzles of a puzzle file; CountdownError names the file and the line of whatever is wrong."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CountdownError(f"cannot read `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise CountdownError(f"`{path}`, line {line}: not UTF-8") from error
    if not text:
        raise CountdownError(f"`{path}` is empty", "write puzzles with `countdown gen-data --out FILE`")
    lines = text.removesuffix("\n").split("\n")
    return [_read_line(line, f"`{path}`, line {number}") for number, line in enumerate(lines, 1)]


def _read_line(line: str, place: str) -> Puzzle:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CountdownError(f"{place}: not JSON") from error
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        raise CountdownError(f"{place}: a puzzle is an object with the fields {', '.join(FIELDS)}")
    numbers, target, solution = record["numbers"], record["target"], record["solution"]
    if not isinstance(numbers, list) or any(type(number) is not int for number in (*numbers, target)):
        raise CountdownError(f"{place}: `numbers` is a list of whole numbers, `target` a whole number")
    try:
        puzzle = checked(numbers, target)
    except CountdownError as error:
        raise CountdownError(f"{place}: {error.message}") from error
    if record["split"] != puzzle.split:
        raise CountdownError(f"{place}: {numbers} belongs to the split `{puzzle.split}`")
    if not isinstance(solution, str) or judge(puzzle, parse(solution)) != "correct":
        raise CountdownError(f"{place}: `solution` does not make {target} from {numbers}")
    return puzzle


@dataclass(frozen=True)
class Summary:
    """What a set of puzzles is like; `needs_parentheses` is a share, `solutions` a mean per puzzle."""

    count: int
    train: int
    val: int
    target_min: int
    target_median: float
    target_max: int
    needs_parentheses: float
    solutions: float
    duplicates: int
    overlap: int


def summarize(puzzles: Sequence[Puzzle]) -> Summary:
    """Counts, targets and difficulty of a non-empty set of puzzles.

    Puzzles with the same numbers, in any order, and the same target are one puzzle: `duplicates` counts the surplus,
    `overlap` the puzzles in both splits.
    """
    if not puzzles:
        raise CountdownError("there are no puzzles to summarize")
    train = [puzzle.canonical for puzzle in puzzles if puzzle.split == "train"]
    val = [puzzle.canonical for puzzle in puzzles if puzzle.split == "val"]
    targets = [puzzle.target for puzzle in puzzles]
    difficulty = [(needs_parentheses(puzzle), len(solve(puzzle))) for puzzle in puzzles]
    return Summary(
        count=len(puzzles),
        train=len(train),
        val=len(val),
        target_min=min(targets),
        target_median=statistics.median(targets),
        target_max=max(targets),
        needs_parentheses=statistics.fmean(needs for needs, _ in difficulty),
        solutions=statistics.fmean(solutions for _, solutions in difficulty),
        duplicates=len(puzzles) - len({*train, *val}),
        overlap=len({*train} & {*val}),
    )
