"""Questions that people type: read, or refused in a sentence."""

import json
import time

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.question import read_question


@pytest.mark.parametrize(
    "text",
    [
        "Using the numbers [4, 7, 3], create an expression that equals 25.", "using [4,7,3] make 25", "[4 7 3] = 25",
        "4 7 3 = 25", " 4  7 3=25\n", "4,7,3 -> 25", "4, 7, 3 → 25", "4 7 3 => 25", "(4, 7, 3) equals 25",
    ],
)  # fmt: skip
def test_questions_are_read(text: str) -> None:
    assert read_question(text) == Puzzle((4, 7, 3), 25)


@pytest.mark.parametrize("puzzle", [Puzzle((1, 100), 1000), Puzzle((1, 2, 3, 4, 5, 6), 1)])
def test_the_bounds_of_a_question_are_inside(puzzle: Puzzle) -> None:
    assert read_question(f"{json.dumps(puzzle.numbers)} -> {puzzle.target}") == puzzle


NONE = "there is no puzzle in the question"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", NONE),
        ("what is 2 + 2?", NONE),
        ("4 + 7 + 3 = 14", NONE),
        ("4-7-3 = 25", NONE),
        ("4 7 3", NONE),
        ("4 7 3 make", NONE),
        ("x4 7 3 = 25x", NONE),
        ("٤ 7 3 = 25", NONE),
        ("[] = 4", NONE),
        ("4 7 3 = " + "9" * 5000, NONE),
        ("4 7 3 = 999999999999", "`999999999999` is not a whole number that a puzzle may have"),
        ("4 7 3 = 2.5", "`2.5` is not a whole number that a puzzle may have"),
        ("4.5 7 3 = 25", "`4.5` is not a whole number that a puzzle may have"),
        ("4 7 3 = -25", "the target of a puzzle lies between 1 and 1000, and -25 does not"),
        ("4 −7 3 = 25", "the numbers of a puzzle lie between 1 and 100, and -7 does not"),
        ("4 = 4", "a puzzle has 2 to 6 numbers, not 1"),
        ("1 2 3 4 5 6 7 = 28", "a puzzle has 2 to 6 numbers, not 7"),
        ("4 101 = 25", "the numbers of a puzzle lie between 1 and 100, and 101 does not"),
        ("0 4 = 4", "the numbers of a puzzle lie between 1 and 100, and 0 does not"),
        ("4 7 = 1001", "the target of a puzzle lies between 1 and 1000, and 1001 does not"),
        ("4 7 3 = 2 5", NONE),
        ("4 7 3 = 2,5", NONE),
        ("1/2 3 = 4", NONE),
        ("4 7 3 = 25 = 30", NONE),
        ("4 7 3 make 25 or 26", NONE),
    ],
)
def test_other_questions_are_refused(text: str, message: str) -> None:
    with pytest.raises(CountdownError) as caught:
        read_question(text)
    assert caught.value.message == message


@pytest.mark.faults
@pytest.mark.parametrize("piece", ["[", "4 ", "= ", "make the ", "4, and ", "[4 ", "- "])
def test_long_questions_are_read_at_once(piece: str) -> None:
    for length in (1_000, 100_000):
        start = time.thread_time()
        with pytest.raises(CountdownError):
            read_question((piece * length)[:length])
        assert time.thread_time() - start < 0.5


def test_a_refused_question_comes_with_an_example() -> None:
    with pytest.raises(CountdownError) as caught:
        read_question("help")
    assert caught.value.hint == 'ask as in `countdown solve "4 7 3 = 25"`'
