"""How a completion searches: its tries, slips and repetitions, read from the equations that it writes.

A try is an equation `a = b = c` of numbers in one line, as in `2 * 6 + 10 = 12 + 10 = 22, need 22. Yes!`. All values
are exact. Prose without equations is counted as not parsed, and changes no other number.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from grpo_cli.core.task.expression import SPACE, Expression, ascii_operators, parse, parse_lenient, spans
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import Rules

MOST_TRIES = 100  # of a completion; later ones are not read
MOST_CHARACTERS = 8_000
UNFINISHED = "0123456789+-*/=() "  # arithmetic at the end of a completion that was cut off

Value = int | Fraction | None


def observe(
    completion: str, puzzle: Puzzle, rules: Rules, *, answer: str | None, correct: bool, truncated: bool
) -> dict[str, float]:
    """Behaviour of a completion by name; shares are of its tries, 0 without any. `answer`: as the scorer read it.

    tries, distinct: their number. parsed: share of the reasoning's lines with a try. slips: tries whose parts differ in
    value. repeated: tries made before. invented: tries with a number that is neither the puzzle's nor an earlier
    result. verified: 1 if the answer was computed to the target before it was given. gave_up: 1 if it ends by itself
    with a wrong answer or none, and no try claimed the target. Every puzzle has a solution.
    """
    text = completion[:MOST_CHARACTERS]
    if truncated or len(completion) > MOST_CHARACTERS:
        text = text.rstrip(UNFINISHED)
    reasoning = text.rpartition("<answer>")[0] or text
    lines = [
        line for line in reasoning.splitlines() if line.strip(SPACE) and line.strip() not in ("<think>", "</think>")
    ]
    read = [own for line in lines if (own := _tries(line, rules.operations, len(puzzle.numbers)))]
    tries = [one for own in read for one in own][:MOST_TRIES]
    known, invented = {*puzzle.numbers, puzzle.target}, 0
    for one in tries:
        invented += not known.issuperset(one.numbers)
        known |= one.results
    written = [one.tokens for one in tries]
    hits = [one.tokens for one in tries if one.value == puzzle.target]
    claimed = any(one.claimed == puzzle.target for one in tries)
    final = parse_lenient(answer, rules.operations) if answer else None
    count = max(1, len(tries))
    return {
        "tries": len(tries),
        "distinct": len({*written}),
        "parsed": len(read) / max(1, len(lines)),
        "slips": sum(one.slips for one in tries) / count,
        "repeated": (len(written) - len({*written})) / count,
        "invented": invented / count,
        "verified": float(final is not None and final.tokens in hits),
        "gave_up": float(not correct and not truncated and not claimed),
    }


class _Try(NamedTuple):
    """An equation `a = b = c`: the tokens, numbers and value of `a`, the value of `c`, and the results between."""

    tokens: tuple[str, ...]
    numbers: tuple[int, ...]
    value: Value
    claimed: Value
    results: frozenset[int]
    slips: bool


@lru_cache(maxsize=1 << 14)  # completions of a group write the same lines again and again
def _tries(line: str, operations: str, size: int) -> list[_Try]:
    """The equations of a line; the first part of each has at least two numbers. `size`: numbers in the puzzle."""
    equations: list[_Try] = []
    if "\ufffd" in line:  # a character that no tokens could be decoded to
        return equations
    for span in spans(ascii_operators(line)):
        parts = [parse(text, operations) for part in span.split("=") if (text := part.strip(" *"))]
        readable = [part for part in parts if part]
        if len(readable) > 1 and parts[0] and len(parts[0].numbers) > 1:
            pairs = list(pairwise(readable))
            new = [Counter(part.numbers) - Counter(before.numbers) for before, part in pairs]
            slips = not all(_follows(part, before, size) for before, part in pairs)
            first, last = readable[0], readable[-1]
            results = frozenset(number for own in new for number in own)
            equations.append(_Try(first.tokens, first.numbers, first.value, last.value, results, slips))
    return equations


def _follows(part: Expression, before: Expression, size: int) -> bool:
    """Whether a part has the value of the one before it, or continues with it as in `2 + 6 = 8 + 9 = 17`."""
    runs_on = len(before.numbers) < size and len(part.numbers) > 1
    return part.value == before.value or (runs_on and part.tokens[0] == str(before.value))
