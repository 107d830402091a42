"""Countdown puzzles: numbers, target, split and validity."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.expression import Expression
from grpo_cli.core.task.rules import ORIGINAL, Rules
from grpo_cli.core.task.task import Side as Side

Verdict = Literal["correct", "not_an_expression", "wrong_numbers", "wrong_value"]

SIZES = range(2, 7)
NUMBERS = range(1, 101)  # valid in any question, whatever the rules
TARGETS = range(1, 1001)


def split_of(numbers: Iterable[int]) -> Side:
    """`val` if every number is even, else `train`."""
    return "train" if any(number % 2 for number in numbers) else "val"


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Make `target` from `numbers` by arithmetic."""

    numbers: tuple[int, ...]
    target: int

    @property
    def split(self) -> Side:
        """The split of the numbers."""
        return split_of(self.numbers)

    @property
    def canonical(self) -> "Puzzle":
        """The same puzzle with its numbers sorted."""
        return Puzzle(tuple(sorted(self.numbers)), self.target)

    @property
    def key(self) -> str:
        """Equal for puzzles that differ only in the order of their numbers."""
        return f"{' '.join(map(str, sorted(self.numbers)))} -> {self.target}"

    @property
    def size(self) -> int:
        """Number of numbers."""
        return len(self.numbers)

    def record(self) -> dict[str, object]:
        """The fields of the puzzle in a file."""
        return {"numbers": list(self.numbers), "target": self.target}

    def __str__(self) -> str:
        return f"{list(self.numbers)} -> {self.target}"


def checked(numbers: Sequence[int], target: int, rules: Rules = ORIGINAL) -> Puzzle:
    """A valid puzzle: 2 to 6 numbers from 1 to 100 and a target from 1 to 1000, or wider if the rules are.

    Raises CountdownError otherwise.
    """
    check_size(len(numbers))
    _check_bounds("numbers of a puzzle lie", numbers, NUMBERS, rules.numbers)
    _check_bounds("target of a puzzle lies", [target], TARGETS, rules.targets)
    return Puzzle(tuple(numbers), target)


def _check_bounds(what: str, values: Sequence[int], usual: range, rules: range) -> None:
    lowest, highest = min(usual[0], rules[0]), max(usual[-1], rules[-1])
    for value in values:
        if not lowest <= value <= highest:
            raise CountdownError(f"the {what} between {lowest} and {highest}, and {value} does not")


def check_size(size: int) -> None:
    if size not in SIZES:
        raise CountdownError(f"a puzzle has {SIZES[0]} to {SIZES[-1]} numbers, not {size}")


def judge(puzzle: Puzzle, expression: Expression | None, rules: Rules = ORIGINAL) -> Verdict:
    """The verdict on an expression: correct, or the first thing that is wrong."""
    if expression is None:
        return "not_an_expression"
    used, given = Counter(expression.numbers), Counter(puzzle.numbers)
    if used != given if rules.use_all else not used <= given:
        return "wrong_numbers"
    return "correct" if expression.value == puzzle.target else "wrong_value"
