"""Prompts in three styles, and questions that a person types."""

import re
from typing import Literal, get_args

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.puzzle import Puzzle, checked

Style = Literal["one-shot", "zero-shot", "natural"]


STYLES: tuple[Style, ...] = get_args(Style)


SYSTEM = "You are a mathematical puzzle solver."


RULES = "Use every number exactly once, with +, - and *."


TAGS = "Think inside <think> </think>, then write the expression inside <answer> </answer>."


NATURAL = "End with the expression."


EXAMPLE = Puzzle((3, 5, 2), 13)


WORKED_EXAMPLE = (
    "<think>\n"
    "3 + 5 + 2 = 8 + 2 = 10, need 13. No.\n"
    "3 * 5 + 2 = 15 + 2 = 17, need 13. No.\n"
    "5 * 2 + 3 = 10 + 3 = 13, need 13. Yes!\n"
    "</think>\n"
    "<answer>5 * 2 + 3</answer>"
)


_WHOLE = r"(?<![-−.\w])([0-9]{1,9})(?!\.?[0-9]|\w)"


_SENTENCE = re.compile(rf"\[([0-9, ]{{1,100}})\][^0-9\[\]]{{1,100}}{_WHOLE}")


_SHORT = re.compile(rf"([0-9](?:[0-9, ]{{0,99}}[0-9])?)\s*(?:=|->|→)\s*{_WHOLE}")


def question(puzzle: Puzzle) -> str:
    """The sentence that states a puzzle."""
    return f"Using the numbers {list(puzzle.numbers)}, create an expression that equals {puzzle.target}."


def prompt(puzzle: Puzzle, style: Style = "one-shot") -> list[dict[str, str]]:
    """The chat messages that ask a model to solve the puzzle."""
    example = [_user(EXAMPLE, style), {"role": "assistant", "content": WORKED_EXAMPLE}] if style == "one-shot" else []
    return [{"role": "system", "content": SYSTEM}, *example, _user(puzzle, style)]


def _user(puzzle: Puzzle, style: Style) -> dict[str, str]:
    return {"role": "user", "content": f"{question(puzzle)} {RULES} {NATURAL if style == 'natural' else TAGS}"}


def read_question(text: str) -> Puzzle:
    """The puzzle that `text` asks for: the question's sentence, `4 7 3 = 25` or `4,7,3 -> 25`.

    It has 2 to 6 numbers from 1 to 100 and a target from 1 to 1000; CountdownError otherwise.
    """
    found = _SHORT.fullmatch(text.strip()) or _SENTENCE.search(text)
    if not found:
        raise CountdownError("there is no puzzle in the question", 'ask as in `countdown solve "4 7 3 = 25"`')
    return checked([int(number) for number in re.findall("[0-9]+", found[1])], int(found[2]))
