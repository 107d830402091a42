"""How a completion searches: its tries, slips and repetitions, read from the equations that it writes.

A try is an equation `a = b = c` of numbers in one line, as in `2 * 6 + 10 = 12 + 10 = 22, need 22. Yes!`. All values
are exact. Prose without equations is counted as not parsed, and changes no other number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from grpo_cli.core.task.expression import SPACE, Expression, ascii_operators, parse, spans
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import Rules

MOST_TRIES = 100  # of a completion; later ones are not read
MOST_CHARACTERS = 8_000

_parsed = lru_cache(maxsize=1 << 15)(parse)  # completions of a group write the same expressions again and again


def observe(completion: str, puzzle: Puzzle, rules: Rules, *, correct: bool, truncated: bool) -> dict[str, float]:
    """Behaviour of a completion by name; shares are of its tries, 0 without any.

    tries, distinct: their number. parsed: share of the reasoning's lines with a try. slips: tries whose parts differ in
    value. repeated: tries made before. invented: tries with a number that is neither the puzzle's nor an earlier
    result. verified: 1 if the answer was computed to the target before it was given. gave_up: 1 if it ends by itself
    with a wrong answer or none, and no try reached the target.
    """
    reasoning, _, answer = completion[:MOST_CHARACTERS].partition("<answer>")
    lines = [
        line for line in reasoning.splitlines() if line.strip(SPACE) and line.strip() not in ("<think>", "</think>")
    ]
    found = [own for line in lines if (own := list(_tries(line, rules.operations)))]
    tries = [one for own in found for one in own][:MOST_TRIES]
    known, invented, slips = {*puzzle.numbers}, 0, 0
    for first, *rest in tries:
        invented += not known.issuperset(first.numbers)
        slips += any(part.value != first.value for part in rest)
        known.update(number for part in (first, *rest) for number in part.numbers)
    written = [first.tokens for first, *_ in tries]
    hits = [first.tokens for first, *_ in tries if first.value == puzzle.target]
    final = _parsed(answer.partition("</answer>")[0].strip(SPACE), rules.operations)
    count = max(1, len(tries))
    return {
        "tries": len(tries),
        "distinct": len({*written}),
        "parsed": len(found) / max(1, len(lines)),
        "slips": slips / count,
        "repeated": (len(written) - len({*written})) / count,
        "invented": invented / count,
        "verified": float(final is not None and final.tokens in hits),
        "gave_up": float(not correct and not truncated and not hits),
    }


def _tries(line: str, operations: str) -> Iterator[list[Expression]]:
    """The equations of a line, as their parts; the first part of each has at least two numbers."""
    for span in spans(ascii_operators(line)):
        parts = [part for text in span.split("=") if (part := _parsed(text.strip(" *"), operations))]
        if len(parts) > 1 and len(parts[0].numbers) > 1:
            yield parts
