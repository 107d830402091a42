"""Reads the puzzle that a person types: `4 7 3 = 25`, `[4, 7, 3] -> 25`, or `using the numbers 4, 7, 3 make 25`."""

import re

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.puzzle import Puzzle, checked
from grpo_cli.core.task.rules import ORIGINAL, Rules

LONGEST = 1_000  # characters

_NUMBER = r"[-−]?[0-9]+(?:\.[0-9]+)?"
_PUZZLE = re.compile(
    rf"[a-z\s:]*[\[(]?({_NUMBER}(?:[\s,;]+{_NUMBER})*)[\])]?,?"
    rf"(?:[a-z\s]*\b(?:makes?|equals?|reach)\s|\s*(?:=|[=-]>|→))\s*({_NUMBER})[\s.!]*"
)
_HINT = 'ask as in `countdown solve "4 7 3 = 25"`'


def read_question(text: str, rules: Rules = ORIGINAL) -> Puzzle:
    """The puzzle that `text` asks for; CountdownError if there is none, or the rules forbid it."""
    return checked(*parse(text), rules)


def parse(text: str) -> tuple[list[int], int]:
    """Numbers and target, whatever the rules; raises as `read_question`."""
    match = _PUZZLE.fullmatch(text.lower()) if len(text) <= LONGEST else None
    if match is None:
        raise CountdownError("there is no puzzle in the question", _HINT)
    return [_whole(number) for number in re.findall(_NUMBER, match[1])], _whole(match[2])


def _whole(number: str) -> int:
    if "." in number or len(number) > 9:
        raise CountdownError(f"`{number[:20]}` is not a whole number that a puzzle may have", _HINT)
    return int(number.replace("−", "-"))
