"""How completions search, against tries counted by hand."""

import time
from pathlib import Path

import pytest

from grpo_cli.core.task.behaviour import observe
from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import ORIGINAL

PUZZLE = Puzzle((2, 6, 9), 30)


def seen(text: str, *, correct: bool = False, truncated: bool = False) -> dict[str, float]:
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else None
    return observe(text, PUZZLE, ORIGINAL, answer=answer, correct=correct, truncated=truncated)


SEARCH = """<think>
2 + 6 + 9 = 8 + 9 = 17, need 30. No.
6 + 9 - 2 = 15 - 2 = 13, need 30. No.
2 + 6 + 9 = 8 + 9 = 18, need 30. No.
(9 + 6) * 2 = 15 * 2 = 30, need 30. Yes!
</think>
<answer>(9 + 6) * 2</answer>"""


def test_a_search_of_the_built_in_model() -> None:
    assert seen(SEARCH, correct=True) == {
        "tries": 4, "distinct": 3, "parsed": 1.0, "slips": 0.25, "repeated": 0.25, "invented": 0.0, "verified": 1.0,
        "gave_up": 0.0,
    }  # fmt: skip


CASES = [
    ("<think>\n2 + 6 + 9 = 17, need 30. No.\nI give up.\n</think>\n<answer>2 + 6 + 9</answer>", "gave_up", 1.0),
    ("<think>\n2 + 6 + 9 = 17, need 30. No.\nI give up.\n</think>\n<answer>2 + 6 + 9</answer>", "parsed", 0.5),
    ("<think>\n2 + 6 + 9 = 17, need 30. No.", "verified", 0.0),
    ("(6 + 9) * 2 = 30\n<answer>6 + 9 * 2</answer>", "verified", 0.0),  # another expression than the one computed
    ("(6 + 9) * 2 = 30\n<answer>( 6+9 )*2</answer>", "verified", 1.0),  # spaces do not matter
    ("(6 + 9) * 2 = 30\n<answer>6 + 9 * 2</answer>", "gave_up", 0.0),  # it did reach the target
    ("7 + 6 + 9 = 22", "invented", 1.0),
    ("First 6 + 9 = 15, then 15 * 2 = 30.", "invented", 0.0),  # an earlier result is no invention
    ("First 6 + 9 = 15, then 15 * 2 = 30.", "tries", 2),
    ("First 6 + 9 = 15, then 16 * 2 = 32.", "invented", 0.5),
    ("Let us see: 6 × 9 = 54 and 54 − 2 = 53.", "slips", 0.5),
    ("Let us see: 6 \\times 9 = 54.", "slips", 0.0),
    ("1. 6 + 9 = 15\n2. 6 + 9 = 15\n3. 6+9=15", "repeated", 2 / 3),
    ("- 6 + 9 = 15\n- 9 + 6 = 15", "repeated", 0.0),
    ("The numbers are 2, 6 and 9.\nI think about them.", "parsed", 0.0),
    ("The target is x = 30, so 30 = 30.", "tries", 0),
    ("2**6 = 64\n9 / 2 = 4.5\n6 // 2 = 3", "tries", 0),  # no expressions of these rules
    ("6 + 9 = 16, need 30. No.\n6 + 16 = 22\n6 + 16 = 22", "invented", 0.0),  # a wrong result is one too
    ("7 + 6 = 13\n7 + 9 = 16", "invented", 1.0),  # still invented the second time
    ("30 - 9 = 21, and 21 = 2 * 6 + 9", "invented", 0.0),  # backwards from the target
    ("2 + 6 = 8 + 9 = 17", "slips", 0.0),  # a running result
    ("2 + 6 + 9 = 17 + 9 = 26", "slips", 1.0),  # nothing is left to run on
    ("2 + 6 = 9 + 9 = 18", "slips", 1.0),
    ("(6 + 9) * 2 = 29, need 30. No.", "gave_up", 1.0),  # it did not see it
    ("6 + 9 * 2 = 30, need 30. Yes!", "gave_up", 0.0),  # wrong, but claimed
    ("6 + 9 9 = 6 + 9 = 15", "tries", 0),  # its expression cannot be read
    ("6 \ufffd + 9 = 15", "tries", 0),
    ("<think>Say <answer>x</answer>. (6 + 9) * 2 = 30</think>\n<answer>(6 + 9) * 2</answer>", "verified", 1.0),
    ("(6 + 9) * 2 = 30\n<answer>(6 + 9) × 2 = 30</answer>", "verified", 1.0),
    ("", "tries", 0),
    ("", "gave_up", 1.0),
]


@pytest.mark.parametrize(("text", "name", "value"), CASES)
def test_what_a_completion_does(text: str, name: str, value: float) -> None:
    assert seen(text)[name] == pytest.approx(value)


def test_a_completion_that_was_cut_off_did_not_give_up() -> None:
    assert seen("2 + 6 + 9 = 17", truncated=True)["gave_up"] == 0.0
    assert seen("2 + 6 + 9 = 17")["gave_up"] == 1.0


CUT = [
    ("2 + 6 = 8\n2 + 6 + 9 = 1", 1, 0.0),
    ("2 + 6 = 8\n2 + 6 + 9 = 8 + ", 1, 0.0),
    ("2 + 6 = 9, so 9 * 9 = 8", 1, 1.0),
    ("2 + 6 + 9 = 18, need 3", 1, 1.0),
]


@pytest.mark.parametrize(("text", "tries", "slips"), CUT)
def test_an_equation_that_was_cut_off_is_not_judged(text: str, tries: int, slips: float) -> None:
    found = seen(text, truncated=True)
    assert (found["tries"], found["slips"]) == (tries, slips)


HOSTILE = [
    "1=" * 50_000,
    "(" * 50_000,
    "9" * 50_000 + "=1",
    "1 + 1 = 2 " * 5_000,
    "\n" * 50_000,
    "=" * 50_000,
    "1+1=\x00",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_takes_long_or_raises(text: str) -> None:
    start = time.process_time()
    found = seen(text)
    assert time.process_time() - start < 0.2
    assert all(0 <= found[name] <= 1 for name in found if name not in ("tries", "distinct"))


def test_every_score_of_countdown_has_it() -> None:
    score = Countdown().score(SEARCH, PUZZLE, style="one-shot")
    assert score.correct and score.behaviour == seen(SEARCH, correct=True)


LABELLED = (Path(__file__).parent / "labelled_completions.txt").read_text("utf-8").splitlines()[4:]


@pytest.mark.parametrize("line", LABELLED)
def test_counts_agree_with_labels_by_hand(line: str) -> None:
    labels, written = line.split(" ", 1)
    question, shown = written.split(" # ")
    numbers, target = question.split(" -> ")
    text = "<think>\n" + shown.replace("G|", "I give up.|")
    for short, word in ((" N", "No."), (" Y", "Yes!")):
        text = text.replace(f"{short}|", f", need {target}. {word}|")
    text, is_whole = text.replace("|>", "|</think>|<answer>").replace("|", "\n"), "|>" in shown
    puzzle = Puzzle(tuple(map(int, numbers.split(","))), int(target))
    score = Countdown().score(text + "</answer>" * is_whole, puzzle, style="one-shot", truncated=not is_whole)
    found, count = score.behaviour, score.behaviour["tries"]
    shares = [found[name] * count for name in ("slips", "repeated", "invented")]
    assert [round(value) for value in (count, *shares, found["verified"], found["gave_up"])] == list(map(int, labels))
    assert found["distinct"] == count - round(shares[1])
