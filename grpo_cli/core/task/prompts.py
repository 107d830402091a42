"""The chat messages that put a puzzle to a model, in three styles."""

from typing import Literal, get_args

from grpo_cli.core.task.puzzle import Puzzle

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


def question(puzzle: Puzzle) -> str:
    """The sentence that states a puzzle."""
    return f"Using the numbers {list(puzzle.numbers)}, create an expression that equals {puzzle.target}."


def prompt(puzzle: Puzzle, style: Style = "one-shot") -> list[dict[str, str]]:
    """The chat messages that ask a model to solve the puzzle."""
    example = [_user(EXAMPLE, style), {"role": "assistant", "content": WORKED_EXAMPLE}] if style == "one-shot" else []
    return [{"role": "system", "content": SYSTEM}, *example, _user(puzzle, style)]


def _user(puzzle: Puzzle, style: Style) -> dict[str, str]:
    return {"role": "user", "content": f"{question(puzzle)} {RULES} {NATURAL if style == 'natural' else TAGS}"}
