"""The chat messages of a puzzle, in three styles."""

from typing import Literal, get_args

from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import ORIGINAL, Rules
from grpo_cli.core.task.task import Message

Style = Literal["one-shot", "zero-shot", "natural"]

STYLES: tuple[Style, ...] = get_args(Style)

SYSTEM = "You are a mathematical puzzle solver."

THINK, ANSWER = ("<think>", "</think>"), ("<answer>", "</answer>")

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


def prompt(puzzle: Puzzle, style: Style = "one-shot", rules: Rules = ORIGINAL) -> list[Message]:
    """The chat messages that ask a model to solve the puzzle."""
    system = {"role": "system", "content": SYSTEM}
    if style != "one-shot":
        return [system, _user(puzzle, style, rules)]
    example, answer = worked_example(rules)
    assistant = {"role": "assistant", "content": answer}
    return [system, _user(example, style, rules), assistant, _user(puzzle, style, rules)]


def plain(messages: list[Message]) -> list[Message]:
    """A single message with the text of all, which ends where the assistant answers: TinyZero applies no template."""
    names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
    turns = [names[message["role"]] + message["content"] for message in messages]
    return [{"role": "user", "content": "\n".join([*turns, "Assistant:"])}]


def worked_example(rules: Rules = ORIGINAL) -> tuple[Puzzle, str]:
    """A puzzle and a completion that solves it, with allowed operations."""
    operations = rules.operations
    if "+" in operations and "*" in operations:
        return EXAMPLE, WORKED_EXAMPLE
    first, second = operations[-1], operations[0]  # `-` and `/` come first, to keep the value positive and whole
    expression = f"12 {first} 3 {second} 2"
    parts = [parse(text, operations) for text in (f"12 {first} 3", expression)]
    partial, target = (int(part.value) for part in parts if part is not None and part.value is not None)
    thought = f"{expression} = {partial} {second} 2 = {target}, need {target}. Yes!"
    return Puzzle((12, 3, 2), target), f"<think>\n{thought}\n</think>\n<answer>{expression}</answer>"


def _user(puzzle: Puzzle, style: Style, rules: Rules) -> Message:
    asked = f"{question(puzzle)} {instruction(rules)} {NATURAL if style == 'natural' else TAGS}"
    return {"role": "user", "content": asked}


def instruction(rules: Rules = ORIGINAL) -> str:
    """The sentence that states the rules."""
    others, last = ", ".join(rules.operations[:-1]), rules.operations[-1]
    operations = f"{others} and {last}" if others else last
    return f"Use {'every number exactly' if rules.use_all else 'each number at most'} once, with {operations}."
