"""Imitation before reinforcement."""

import re

import pytest

from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rl.warm_start import demonstration, demonstrations, warm_start
from grpo_cli.core.task.data import puzzle_set
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score

TRAIN = puzzle_set(3, "train")


def test_a_demonstration_shows_each_try_worked_out() -> None:
    assert demonstration(Puzzle((10, 2, 7), 27), style="zero-shot") == (
        "<think>\n2+7+10=9+10=19 no\n7+10-2=17-2=15 no\n2+10-7=12-7=5 no\n2+7-10=9-10=-1 no\n10-2-7=8-7=1 no\n"
        "2*7+10=14+10=24 no\n2*7-10=14-10=4 no\n2*10+7=20+7=27 yes\n</think>\n<answer>2 * 10 + 7</answer>"
    )


@pytest.mark.parametrize("style", STYLES)
def test_every_demonstration_solves_its_puzzle_without_trying_twice(style: str) -> None:
    for puzzle in TRAIN:
        text = demonstration(puzzle, style=style)  # type: ignore[arg-type]
        tried = re.findall(r"^(\S+?)=.* (?:no|yes)$", text, re.MULTILINE)
        assert score(text, puzzle, style=style).correct, (puzzle, text)  # type: ignore[arg-type]
        assert len(tried) == len(set(tried)) >= 1


def test_short_and_long_searches_are_shown_equally_often() -> None:
    shown = demonstrations(TRAIN, 900, style="zero-shot", seed=3)
    lengths = [text.count(" no\n") for _, text in shown]
    assert min(lengths) == 0 and max(lengths) == 18
    assert min(lengths.count(length) for length in range(19)) > 20  # 47 expected
    assert any("(" in text for _, text in shown)


def test_a_warm_start_makes_demonstrations_likely(tiny_policy: Policy) -> None:
    losses: list[float] = []
    before = tiny_policy.sums()
    examples = demonstrations(TRAIN, 4, style="zero-shot", seed=3) * 24
    warm_start(
        tiny_policy,
        examples,
        style="zero-shot",
        learning_rate=3e-3,
        report=lambda step, total, loss: losses.append(loss),
    )
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert tiny_policy.sums() != before
