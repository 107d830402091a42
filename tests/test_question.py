"""Questions that people type: read, or refused in a sentence."""

import json
import time

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.prompts import prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.question import read_question


@pytest.mark.parametrize(
    "text",
    [
        "Using the numbers [4, 7, 3], create an expression that equals 25.", "using [4,7,3] make 25", "[4 7 3] = 25",
        "[4, 7, 3] 25", "4 7 3 = 25", " 4  7 3=25\n", "4,7,3 -> 25", "4, 7, 3 → 25", "4 7 3 => 25", "25 = 4 7 3",
        "(4, 7, 3) equals 25", "make 25 from 4 7 3", "Use each of [4, 7, 3] exactly 1 time to make 25",
        "[4,7,3] with 2 operators makes 25", "How can I get 25 out of 4, 7 and 3 in 2 steps?",
        "3 numbers: 4 7 3. The target is 25.", "Given 4, 7 & 3, reach the target 25!",
        prompt(Puzzle((4, 7, 3), 25), "natural")[-1]["content"],
    ],
)  # fmt: skip
def test_questions_are_read(text: str) -> None:
    assert read_question(text) == Puzzle((4, 7, 3), 25)


@pytest.mark.parametrize("puzzle", [Puzzle((1, 100), 1000), Puzzle((1, 2, 3, 4, 5, 6), 1)])
def test_the_bounds_of_a_question_are_inside(puzzle: Puzzle) -> None:
    assert read_question(f"{json.dumps(puzzle.numbers)} -> {puzzle.target}") == puzzle


NONE = "there is no puzzle in the question"
TWO = "the question can be read in two ways: "


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
        ("x4 7 3 = 25", NONE),
        ("4 7 3 = 25x", NONE),
        ("٤ 7 3 = 25", NONE),
        ("4 7 3 = " + "9" * 5000, NONE),
        ("4 7 3 = 999999999999", "`999999999999` is not a whole number that a puzzle may have"),
        ("4 7 3 = 2.5", "`2.5` is not a whole number that a puzzle may have"),
        ("4.5 7 3 = 25", "`4.5` is not a whole number that a puzzle may have"),
        ("[4, 7, 3] equals 2.5", "`2.5` is not a whole number that a puzzle may have"),
        ("4 7 3 = -25", "the target of a puzzle lies between 1 and 1000, and -25 does not"),
        ("-4 7 3 = 25", "the numbers of a puzzle lie between 1 and 100, and -4 does not"),
        ("4 −7 3 = 25", "the numbers of a puzzle lie between 1 and 100, and -7 does not"),
        ("4 = 4", "a puzzle has 2 to 6 numbers, not 1"),
        ("[] = 4", "a puzzle has 2 to 6 numbers, not 0"),
        ("1 2 3 4 5 6 7 = 28", "a puzzle has 2 to 6 numbers, not 7"),
        ("4 101 = 25", "the numbers of a puzzle lie between 1 and 100, and 101 does not"),
        ("0 4 = 4", "the numbers of a puzzle lie between 1 and 100, and 0 does not"),
        ("4 7 = 1001", "the target of a puzzle lies between 1 and 1000, and 1001 does not"),
        ("4 7 = 0", "the target of a puzzle lies between 1 and 1000, and 0 does not"),
        ("4 7 3 = 2 5", NONE),
        ("4 7 3 = 2,5", NONE),
        ("1/2 3 = 4", NONE),
        ("4 * 7 3 = 25", NONE),
        ("10 + 4 7 3 = 25", NONE),
        ("4**2 7 = 25", NONE),
        ("4 7 3 = 25+1", NONE),
        ("4 7 3 = 25 - 1", NONE),
        ("4 - 7 3 = 25", NONE),
        ("4! 7 3 = 25", NONE),
        ("4 7 (3) = 25", NONE),
        ("[[4, 7], [3]] = 25", NONE),
        ("make 1 million from 4 7 8", NONE),
        ("make 10% of 4 7 8", NONE),
        ("4 7 3 = 25 = 30", TWO + "`4 7 3 = 25` or `4 7 3 = 30`"),
        ("[4, 7] or [3, 9] make 12", TWO + "`4 7 = 12` or `3 9 = 12`"),
        ("4 7 3 make 25 or 26", TWO + "`4 7 3 = 25` or `4 7 3 = 26`"),
        ("[4, 7, 3] 25 or 30", TWO + "`4 7 3 = 25` or `4 7 3 = 30`"),
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
