"""Score a completion: find its tags and answer, and check the answer.

The only module that parses the tags. A completion is untrusted: it is parsed, never evaluated.
"""

from dataclasses import dataclass
from typing import Literal

from grpo_cli.core.task.expression import SPACE, Expression, ascii_operators, last_expression, parse, parse_lenient
from grpo_cli.core.task.prompts import Style
from grpo_cli.core.task.puzzle import Puzzle, judge
from grpo_cli.core.task.rules import ORIGINAL, Rules
from grpo_cli.core.task.task import Score as Score

Reason = Literal["correct", "no_answer", "truncated", "not_an_expression", "wrong_numbers", "wrong_value"]
Cheat = Literal["numbers", "not_arithmetic", "no_thought"]


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards: `correct` for a correct answer, instead of all others; else the sum of the others."""

    format: float = 0.1  # each well-formed tag pair
    numbers: float = 0.0  # a wrong answer that uses the right numbers
    correct: float = 1.0


ORIGINAL_REWARDS = Rewards()


def score(
    completion: str,
    puzzle: Puzzle,
    *,
    style: Style = "one-shot",
    truncated: bool = False,
    rules: Rules = ORIGINAL,
    rewards: Rewards = ORIGINAL_REWARDS,
) -> Score:
    """Score a completion: by default 1.0 if its answer solves the puzzle, else 0.1 for each well-formed tag pair.

    `truncated`: the completion reached the token limit; changes only the reason.
    """
    tagged = style != "natural"
    before, answer = _tagged_answer(completion) if tagged else ("", _in_prose(completion, puzzle, rules))
    expression = None if answer is None else parse(answer, rules.operations)
    reason: Reason = "no_answer" if answer is None else judge(puzzle, expression, rules)
    correct = reason == "correct"
    read = expression
    if not correct and (not tagged or reason == "not_an_expression"):
        read = _read_leniently(completion, answer, puzzle, style, rules)
    lenient = correct or judge(puzzle, read, rules) == "correct"
    if truncated and not correct and (answer is None or not tagged):
        reason = "truncated"
    cheat: Cheat | None = None
    if reason == "wrong_numbers" and expression and expression.value == puzzle.target:
        cheat = "numbers"
    elif tagged and answer is not None and read is None:
        cheat = "not_arithmetic"
    elif tagged and answer is not None and not _has_pair(before, "<think>", "</think>"):
        cheat = "no_thought"
    pairs = _has_pair(completion, "<think>", "</think>") + _has_pair(completion, "<answer>", "</answer>")
    partial = rewards.format * pairs + rewards.numbers * (reason == "wrong_value")
    reward = rewards.correct if correct else partial
    return Score(reward, correct, reason, answer, well_formed=pairs == 2, lenient=lenient, cheat=cheat)


def _read_leniently(
    completion: str, answer: str | None, puzzle: Puzzle, style: Style, rules: Rules
) -> Expression | None:
    if style == "natural":
        answer = _in_prose(ascii_operators(completion), puzzle, rules)
    return None if answer is None else parse_lenient(answer, rules.operations)


def _in_prose(completion: str, puzzle: Puzzle, rules: Rules) -> str | None:
    return last_expression(completion, puzzle.numbers, rules.operations)


def _tagged_answer(completion: str) -> tuple[str, str | None]:
    """The text before the last complete answer pair, and the pair's text, stripped; the inner pair if nested."""
    until, _, _ = completion.rpartition("</answer>")
    before, opening, answer = until.rpartition("<answer>")
    return before, answer.partition("</answer>")[0].strip(SPACE) if opening else None


def _has_pair(completion: str, opening: str, closing: str) -> bool:
    start = completion.find(opening)
    return start >= 0 and completion.find(closing, start) >= 0
