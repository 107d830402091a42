"""Worked search traces, which the built-in model imitates before any reinforcement.

A trace tries one expression per line, in a fixed order (sums, then products, then parentheses), computes it one binary
step at a time, compares the value with the target, and stops at the first solution or when patience runs out:

    2 + 6 + 10 = 8 + 10 = 18, need 22. No.
    2 * 6 + 10 = 12 + 10 = 22, need 22. Yes!

Verdicts are always true, and the search does not look ahead.
"""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Callable, Iterator, Sequence

from grpo_cli.core.task.prompts import Style
from grpo_cli.core.task.puzzle import Puzzle

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}

# A tree of integers: a number, or (operation, left, right).
Tree = int | tuple[str, "Tree", "Tree"]
Patience = Callable[[int], float]
"""Number of failed tries so far -> probability of giving up now."""

THREE = (
    "a+b+c", "b+c-a", "a+c-b", "a+b-c", "c-a-b",
    "a*b+c", "a*b-c", "a*c+b", "a*c-b", "b*c+a", "b*c-a",
    "(a+b)*c", "(a+c)*b", "(b+c)*a", "(b-a)*c", "(c-a)*b", "(c-b)*a",
    "a*b*c", "c-a*b",
)  # fmt: skip
"""All forms over sorted numbers a <= b <= c that a positive target can need: together they solve all 2,506 puzzles."""

FOUR = (
    "a+b+c+d", "b-a+c+d", "a+b-c+d", "b-a-c+d",
    "a*d+b+c", "c*d-a+b", "c*d-a-b",
    "(a+b)*d+c", "(b-a)*c+d", "(c-a)*d+b", "(c-a)*d-b", "(d-b)*c+a", "(b-c+d)*a", "(c-a+d)*b",
)  # fmt: skip
"""The forms over four sorted numbers that together solve most train puzzles, 30 %; a completion holds no more."""

FORMS = {3: THREE, 4: FOUR}
_SYMBOLS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def form_tree(form: str, numbers: Sequence[int]) -> Tree:
    """The tree of one of the FORMS: `"(a+b)*c", (2, 6, 10)` -> `("*", ("+", 2, 6), 10)`."""
    return _bound(ast.parse(form, mode="eval").body, numbers)


def _bound(node: ast.expr, numbers: Sequence[int]) -> Tree:
    if isinstance(node, ast.Name):
        return numbers["abcd".index(node.id)]
    assert isinstance(node, ast.BinOp)
    return (_SYMBOLS[type(node.op)], _bound(node.left, numbers), _bound(node.right, numbers))


def write(tree: Tree) -> str:
    """The expression with only the necessary parentheses: `("*", ("+", 2, 6), 10)` -> `"(2 + 6) * 10"`."""
    if isinstance(tree, int):
        return str(tree)
    operation, left, right = tree
    return f"{_operand(left, operation)} {operation} {_operand(right, operation, is_right=True)}"


def _operand(tree: Tree, operation: str, *, is_right: bool = False) -> str:
    text = write(tree)
    if isinstance(tree, int):
        return text
    looser = operation == "*" and tree[0] != "*"
    return f"({text})" if looser or (is_right and operation == "-" and tree[0] != "*") else text


def reduce(tree: Tree) -> Tree:
    """The tree after one binary step, the leftmost one whose operands are numbers."""
    if isinstance(tree, int):
        return tree
    operation, left, right = tree
    if isinstance(left, int) and isinstance(right, int):
        return OPERATIONS[operation](left, right)
    if isinstance(left, int):
        return (operation, left, reduce(right))
    return (operation, reduce(left), right)


def evaluated(tree: Tree) -> int:
    """The value of a tree."""
    while not isinstance(tree, int):
        tree = reduce(tree)
    return tree


def line(tree: Tree, target: int) -> tuple[str, bool]:
    """One try: `2 * 6 + 10 = 12 + 10 = 22, need 24. No.`, and whether it reaches the target."""
    steps = [write(tree)]
    while not isinstance(tree, int):
        tree = reduce(tree)
        steps.append(write(tree))
    hit = tree == target
    return f"{' = '.join(steps)}, need {target}. {'Yes!' if hit else 'No.'}", hit


def tries(numbers: Sequence[int]) -> Iterator[Tree]:
    """The trees of a search in order: the FORMS of three or four numbers, none twice."""
    ordered = sorted(numbers)
    seen: set[str] = set()
    for form in FORMS[len(ordered)]:
        tree = form_tree(form, ordered)
        text = write(tree)
        if text not in seen:
            seen.add(text)
            yield tree


def search(puzzle: Puzzle, rng: random.Random, patience: Patience) -> tuple[list[str], str]:
    """The lines of a search and its last expression: the first solution, or the last try before giving up."""
    lines: list[str] = []
    answer = ""
    for failures, tree in enumerate(tries(puzzle.numbers)):
        if failures and rng.random() < patience(failures):
            break
        text, hit = line(tree, puzzle.target)
        lines.append(text)
        answer = write(tree)
        if hit:
            return lines, answer
    return [*lines, "I give up."], answer


def trace(puzzle: Puzzle, rng: random.Random, *, style: Style, patience: Patience) -> str:
    """A completion that imitates a search, in the format of the prompt style."""
    lines, answer = search(puzzle, rng, patience)
    thought = "\n".join(lines)
    if style == "natural":
        return f"{thought}\nThe expression is {answer}"
    return f"<think>\n{thought}\n</think>\n<answer>{answer}</answer>"


def drill(rng: random.Random, numbers: Sequence[int] | None) -> str:
    """One line of arithmetic and comparison: `60 * 2 = 120, need 35. No.`

    Of two operands or, given `numbers`, a random form of them. Half of the values equal the target and a quarter are
    close to it, because comparing is harder than computing.
    """
    tree = form_tree(rng.choice(FORMS[len(numbers)]), numbers) if numbers else _operands(rng)
    value = evaluated(tree)
    need = rng.choice((value, value, value + rng.randint(-3, 3), rng.randint(1, 100)))
    return line(tree, need if 1 <= need <= 100 else rng.randint(1, 100))[0]


def _operands(rng: random.Random) -> Tree:
    """An operation, as frequent as in the steps of a search, mostly on small numbers."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice("+-*"), rng.randint(1, 20), rng.randint(1, 10)
    if kind < 0.8:
        return rng.choice("+-"), rng.randint(1, 100), rng.randint(1, 10)
    if kind < 0.9:
        return "-", rng.randint(1, 10), rng.randint(1, 100)
    return rng.choice("+-*"), rng.randint(-10, 100), rng.randint(1, 10)
