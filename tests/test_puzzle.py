"""The space of puzzles and its solver against brute force, and puzzle files line by line."""

import random
import re
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import permutations, product
from operator import add, mul, sub
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.data import (
    Summary,
    enumerate_puzzles,
    generate,
    json_line,
    puzzle_set,
    summarize,
    write_puzzles,
)
from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.puzzle import Puzzle, Side, checked, judge, split_of
from grpo_cli.core.task.rules import Rules
from grpo_cli.core.task.solver import solve

SYMBOLS = (10_007, 20_011, 40_009, 80_021, 160_001)  # in the place of the numbers


def brute_force(numbers: tuple[int, ...], operations: str = "+-*") -> dict[Fraction | int, set[Fraction | int]]:
    """Every value of a tree of operations over the numbers, with the functions that have it.

    A function is known by its value at `SYMBOLS`: equal ones agree, others differ but for a freak.
    """

    @cache
    def trees(order: tuple[int, ...]) -> set[tuple[Fraction | int, Fraction | int]]:
        if len(order) == 1:
            return {(numbers[order[0]], SYMBOLS[order[0]])}
        made: set[tuple[Fraction | int, Fraction | int]] = set()
        for cut in range(1, len(order)):
            for (a, x), (b, y) in product(trees(order[:cut]), trees(order[cut:])):
                made |= {(do(a, b), do(x, y)) for do in doing if do is not Fraction or (b and y)}
        return made

    every: dict[str, Callable[..., Any]] = {"+": add, "-": sub, "*": mul, "/": Fraction}
    doing = [every[operation] for operation in operations]
    found: dict[Fraction | int, set[Fraction | int]] = {}
    for value, function in set().union(*map(trees, permutations(range(len(numbers))))):
        found.setdefault(value, set()).add(function)
    return found


@pytest.mark.parametrize(
    ("numbers", "split"),
    [((2, 4, 6), "val"), ((10, 10), "val"), ((2, 4, 5), "train"), ((1, 4, 6), "train"), ((9, 7, 3, 1), "train")],
)
def test_all_even_numbers_are_val(numbers: tuple[int, ...], split: Side) -> None:
    assert split_of(numbers) == Puzzle(numbers, 10).split == split


@pytest.mark.parametrize(("numbers", "train", "val"), [(2, 115, 39), (3, 2179, 327), (4, 28209, 1906)])
def test_the_space_has_the_known_size(numbers: int, train: int, val: int) -> None:
    puzzles = list(enumerate_puzzles(numbers))
    assert len(list(enumerate_puzzles(numbers, "train"))) == train
    assert len(list(enumerate_puzzles(numbers, "val"))) == val
    assert len(set(puzzles)) == len(puzzles) == train + val
    assert puzzles == sorted(puzzles, key=lambda puzzle: (puzzle.numbers, puzzle.target))
    assert all(puzzle == puzzle.canonical for puzzle in puzzles)


def test_the_space_of_three_numbers_is_what_brute_force_can_make() -> None:
    targets: dict[tuple[int, ...], set[int]] = {}
    for puzzle in enumerate_puzzles(3):
        targets.setdefault(puzzle.numbers, set()).add(puzzle.target)
    assert targets == {numbers: set(brute_force(numbers)) & set(range(1, 101)) for numbers in targets}
    assert len(targets) == 220


POLYNOMIALS = [(2, 3, 5), (1, 2, 3), (2, 4, 8), (1, 2, 3, 5), (2, 4, 6, 8), (2, 3, 4, 9)]
QUOTIENTS = [(2, 3, 7), (2, 3, 5, 9), (1, 4, 6, 8)]


@pytest.mark.parametrize(
    ("numbers", "operations"), [*((one, "+-*") for one in POLYNOMIALS), *((one, "+-*/") for one in QUOTIENTS)]
)
def test_the_solver_finds_every_function_once(numbers: tuple[int, ...], operations: str) -> None:
    found = brute_force(numbers, operations)
    counts = {target: len(solve(Puzzle(numbers, target), Rules(operations))) for target in range(1, 101)}
    assert counts == {target: len(found.get(target, ())) for target in range(1, 101)}


@pytest.mark.parametrize("target", [1, 23, 24])
def test_the_solver_finds_every_polynomial_of_five_numbers_once(target: int) -> None:
    numbers = (2, 3, 4, 7, 9)
    assert len(solve(Puzzle(numbers, target))) == len(brute_force(numbers)[target])


@pytest.mark.parametrize(
    ("puzzle", "solutions"),
    [
        (Puzzle((3, 5, 2), 13), ["2 * 5 + 3", "3 * 5 - 2"]),
        (Puzzle((2, 3, 5), 25), ["(2 + 3) * 5"]),
        (Puzzle((2, 2, 2), 2), ["2 * 2 - 2", "2 + 2 - 2"]),
        (Puzzle((10, 1, 1), 10), ["1 * 1 * 10", "1 + 10 - 1"]),
        (Puzzle((3, 7, 3), 7), ["3 + 7 - 3"]),
        (Puzzle((7, 7), 49), ["7 * 7"]),
        (Puzzle((1, 1, 1), 100), []),
        (Puzzle((2, 4, 6), 13), []),
    ],
)
def test_solutions_worked_out_by_hand(puzzle: Puzzle, solutions: list[str]) -> None:
    assert solve(puzzle) == solutions


def test_of_two_solutions_that_differ_in_signs_the_one_without_negative_factors_is_listed() -> None:
    solutions = solve(Puzzle((2, 3, 4, 5), 4))
    assert "(4 - 2) * (5 - 3)" in solutions
    assert "(2 - 4) * (3 - 5)" not in solutions


def test_what_is_worth_zero_is_added_and_never_subtracted() -> None:
    solutions = solve(Puzzle((3, 3, 6, 7), 6))
    assert "(3 - 3) * 7 + 6" in solutions
    assert "6 - (3 - 3) * 7" not in solutions


def test_six_numbers_are_solved() -> None:
    puzzle = Puzzle((2, 3, 5, 7, 8, 9), 24)
    solutions = solve(puzzle)
    assert len(set(solutions)) == len(solutions) > 100
    assert solutions == sorted(solutions, key=len)
    assert all(judge(puzzle, parse(solution)) == "correct" for solution in solutions)
    assert "(2 - 2) * (3 + 5 + 7) + 10" in solve(Puzzle((2, 2, 3, 5, 7, 10), 10))


def test_no_pair_of_parentheses_can_be_left_out() -> None:
    for puzzle in generate(200, numbers=4, seed=3):
        for solution in solve(puzzle):
            assert all(at_symbols(shorter) != at_symbols(solution) for shorter in without_one_pair(solution))


def without_one_pair(text: str) -> Iterator[str]:
    opened: list[int] = []
    for index, character in enumerate(text):
        if character == "(":
            opened.append(index)
        elif character == ")":
            start = opened.pop()
            yield text[:start] + text[start + 1 : index] + text[index + 1 :]


def at_symbols(text: str) -> int:
    """The value with a large number in the place of each number."""
    symbols = iter([10007, 20011, 40009, 80021])
    expression = parse(re.sub("[0-9]+", lambda _: str(next(symbols)), text))
    assert expression is not None and isinstance(expression.value, int)
    return expression.value


@pytest.mark.parametrize("numbers", [2, 3, 6])
def test_generated_puzzles_are_made_from_left_to_right(numbers: int) -> None:
    operators: list[Callable[[int, int], int]] = [add, sub, mul]
    for puzzle in generate(50, numbers=numbers, seed=1):
        results = {puzzle.numbers[0]}
        for number in puzzle.numbers[1:]:
            results = {apply(result, number) for result in results for apply in operators}
        assert puzzle.target in results
        assert 1 <= puzzle.target <= 100
        assert len(puzzle.numbers) == numbers
        assert all(1 <= number <= 10 for number in puzzle.numbers)


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_is_generated_on_request(split: Side) -> None:
    assert {puzzle.split for puzzle in generate(50, split=split)} == {split}


def test_the_seeds_puzzles_are_those_of_random_choice() -> None:
    rng = random.Random(7)
    expected: list[Puzzle] = []
    while len(expected) < 200:
        a, b, c = (rng.choice(range(1, 11)) for _ in range(3))
        first, second = (rng.choice((add, sub, mul)) for _ in range(2))
        target = second(first(a, b), c)
        expected += [Puzzle((a, b, c), target)] * (1 <= target <= 100)
    assert generate(200, seed=7) == expected


def test_targets_are_not_searched_one_by_one_for_a_fraction() -> None:
    started = time.process_time()
    assert len(generate(300, numbers=4, rules=Rules("+-*/", 1, 100, 1, 100_000))) == 300
    assert time.process_time() - started < 2


@pytest.mark.parametrize(("numbers", "split"), [(5, "val"), (6, "train")])
def test_a_sample_has_no_puzzle_twice(numbers: int, split: Side) -> None:
    puzzles = puzzle_set(numbers, split)
    assert len({puzzle.canonical for puzzle in puzzles}) == len(puzzles) == 2000


def test_sampling_ends_where_there_are_fewer_puzzles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.task.data.ENUMERABLE", (1, 1))
    monkeypatch.setattr("grpo_cli.core.task.data.MOST_DRAWS", 5_000)
    assert {puzzle.canonical for puzzle in puzzle_set(2, "val")} == set(enumerate_puzzles(2, "val"))


@pytest.mark.parametrize("numbers", [-1, 0, 1, 7])
def test_a_puzzle_has_two_to_six_numbers(numbers: int) -> None:
    message = f"a puzzle has 2 to 6 numbers, not {numbers}"
    with pytest.raises(CountdownError, match=message):
        generate(1, numbers=numbers)
    with pytest.raises(CountdownError, match=message):
        next(enumerate_puzzles(numbers))


@pytest.mark.parametrize(
    ("numbers", "target", "message"),
    [
        ([1], 1, "a puzzle has 2 to 6 numbers, not 1"),
        ([0, 1], 1, "the numbers of a puzzle lie between 1 and 100, and 0 does not"),
        ([1, 101], 1, "the numbers of a puzzle lie between 1 and 100, and 101 does not"),
        ([1, 2], 0, "the target of a puzzle lies between 1 and 1000, and 0 does not"),
        ([1, 2], 1001, "the target of a puzzle lies between 1 and 1000, and 1001 does not"),
    ],
)
def test_puzzles_out_of_bounds_are_refused(numbers: list[int], target: int, message: str) -> None:
    with pytest.raises(CountdownError, match=message):
        checked(numbers, target)


def test_a_line_holds_numbers_target_split_and_a_solution(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.jsonl"
    write_puzzles(path, [Puzzle((3, 5, 2), 13)])
    assert path.read_bytes() == b'{"numbers": [3, 5, 2], "target": 13, "split": "train", "solution": "2 * 5 + 3"}\n'


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.jsonl"
    path.write_text("mine")
    with pytest.raises(CountdownError, match=r"puzzles\.jsonl` exists") as caught:
        write_puzzles(path, generate(1))
    assert "--overwrite" in str(caught.value.hint)
    assert path.read_text() == "mine"
    write_puzzles(path, generate(1), overwrite=True)
    assert path.read_text() == f"{json_line(generate(1)[0])}\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.faults
def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CountdownError, match=r"folder` is a folder"):
        write_puzzles(tmp_path / "folder", generate(1), overwrite=True)
    with pytest.raises(CountdownError, match=r"missing` is not a folder"):
        write_puzzles(tmp_path / "missing" / "puzzles", generate(1))
    with pytest.raises(CountdownError, match=re.escape("100 cannot be made from [1, 1]")):
        write_puzzles(tmp_path / "unsolvable", [Puzzle((1, 1), 100)])
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_summary_counts_by_hand() -> None:
    puzzles = [Puzzle((3, 5, 2), 13), Puzzle((2, 3, 5), 13), Puzzle((2, 3, 5), 25), Puzzle((2, 4), 8)]
    assert summarize(puzzles) == Summary(
        count=4,
        train=3,
        val=1,
        target_min=8,
        target_median=13,
        target_max=25,
        duplicates=1,
    )


@pytest.mark.parametrize(("numbers", "counts"), [(3, (6, 1)), (4, (1694, 80))])
def test_puzzles_that_cannot_be_generated_from_left_to_right(numbers: int, counts: tuple[int, int]) -> None:
    """docs/data.md: seven of three numbers, six train and one val; 1,774 of four."""
    reached = set()
    for drawn in product(range(1, 11), repeat=numbers):
        values = {drawn[0]}
        for number in drawn[1:]:
            values = {result for value in values for result in (value + number, value - number, value * number)}
        reached |= {(tuple(sorted(drawn)), value) for value in values if 1 <= value <= 100}
    everything = list(enumerate_puzzles(numbers=numbers))
    missed = [puzzle for puzzle in everything if (tuple(sorted(puzzle.numbers)), puzzle.target) not in reached]
    splits = [puzzle.split for puzzle in missed]
    assert (splits.count("train"), splits.count("val")) == counts
