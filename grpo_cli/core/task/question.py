"""Reads the puzzle that a person types: `4 7 3 = 25`, or a sentence with numbers and a target."""

import re
from collections.abc import Iterator

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.puzzle import Puzzle, checked
from grpo_cli.core.task.rules import ORIGINAL, Rules

LONGEST = 1_000  # characters

_NUMBER = r"(?:(?<![\w.)\]])[-−])?(?<![\w.])[0-9]+(?:\.[0-9]+)?(?!\w)"
_TARGET = re.compile(
    r"(?:\b(?:make[sd]?|making|equals?|reach(?:es)?|gets?|gives?|target)\b|[=-]>|→|=)"
    rf"[\s:*`]*(?:(?:is|of|to|the|a|total|number|target|value)\b[\s:]*)*({_NUMBER})(?![\s,;]+{_NUMBER})(?:\s+(?:or|and)\s+({_NUMBER}))?"
)
_BRACKETS = re.compile(rf"\[((?:[\s,;]|{_NUMBER})*)\]")
_RUN = re.compile(rf"{_NUMBER}(?:(?:\s*[,;]\s*(?:and\s+)?|\s+(?:and\s+|&\s*)?){_NUMBER})*")
_REVERSED = re.compile(rf"\s*({_NUMBER})\s*=\s*({_RUN.pattern})\s*")  # `25 = 4 7 3`
_OPERATOR = r"(?:\s*[+*/×·^]+|\s+[-−]\s|[-−])"
_UNREADABLE = re.compile(
    rf"{_NUMBER}(?:{_OPERATOR}\s*[0-9]|!\s*[0-9]|\s*(?:%|(?:hundred|thousand|million|billion)\b))"
    rf"|[(\[]\s*{_NUMBER}\s*[)\]]"  # a number of its own in brackets
)
_NUMBERS = re.compile(_NUMBER)
_HINT = 'ask as in `countdown solve "4 7 3 = 25"`'


def read_question(text: str, rules: Rules = ORIGINAL) -> Puzzle:
    """The puzzle that `text` asks for; CountdownError if there is none, or more than one, or the rules forbid it."""
    return checked(*parse(text), rules)


def parse(text: str) -> tuple[list[int], int]:
    """Numbers and target, whatever the rules; raises as `read_question`.

    Numbers in brackets are the numbers, or else the numbers in a row; the target follows make, equals, reach, = or ->.
    """
    readings = list(dict.fromkeys(_readings(text.lower()))) if len(text) <= LONGEST else []
    usual = [reading for reading in readings if len(reading[0]) > 1] or readings * (len(readings) == 1)
    if not usual or re.search(r"\d", _NUMBERS.sub("", text)) or _UNREADABLE.search(text.lower()):
        raise CountdownError("there is no puzzle in the question", _HINT)
    if len(usual) > 1:
        both = " or ".join(f"`{' '.join(numbers)} = {target}`" for numbers, target in usual[:2])
        raise CountdownError(f"the question can be read in two ways: {both}", "ask one of them")
    numbers, target = usual[0]
    return list(map(_whole, numbers)), _whole(target)


def _readings(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every (numbers, target) that the text may mean."""
    if reversed_ := _REVERSED.fullmatch(text):
        yield tuple(_NUMBERS.findall(reversed_[2])), reversed_[1]
        return
    lists = [tuple(_NUMBERS.findall(match[1])) for match in _BRACKETS.finditer(text)]
    outside = _BRACKETS.sub(lambda match: " " * len(match[0]), text)
    targets = [(match.start(n), match[n]) for match in _TARGET.finditer(outside) for n in (1, 2) if match[n]]
    if lists and not targets:
        targets = [(match.start(), match[0]) for match in _NUMBERS.finditer(outside)]
    for start, target in targets:
        rest = outside[:start] + "|" * len(target) + outside[start + len(target) :]
        yield from ((numbers, target) for numbers in lists or map(tuple, map(_NUMBERS.findall, _RUN.findall(rest))))


def _whole(number: str) -> int:
    if "." in number or len(number) > 9:
        raise CountdownError(f"`{number[:20]}` is not a whole number that a puzzle may have", _HINT)
    return int(number.replace("−", "-"))
