"""How completions search, against tries counted by hand."""

import time

import pytest

from grpo_cli.core.task.behaviour import observe
from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import ORIGINAL

PUZZLE = Puzzle((2, 6, 9), 30)


def seen(text: str, *, correct: bool = False, truncated: bool = False) -> dict[str, float]:
    return observe(text, PUZZLE, ORIGINAL, correct=correct, truncated=truncated)


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
    ("", "tries", 0),
    ("", "gave_up", 1.0),
]


@pytest.mark.parametrize(("text", "name", "value"), CASES)
def test_what_a_completion_does(text: str, name: str, value: float) -> None:
    assert seen(text)[name] == pytest.approx(value)


def test_a_completion_that_was_cut_off_did_not_give_up() -> None:
    assert seen("2 + 6 + 9 = 17", truncated=True)["gave_up"] == 0.0
    assert seen("2 + 6 + 9 = 17")["gave_up"] == 1.0


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


def test_observing_a_step_costs_little() -> None:
    """A step of the built-in model scores 128 such completions in a few seconds."""
    start = time.process_time()
    for _ in range(128):
        seen(SEARCH)
    assert time.process_time() - start < 0.2
