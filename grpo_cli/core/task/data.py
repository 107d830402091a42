"""Puzzles in bulk: enumerate, generate, and write them as JSON Lines."""

import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, islice
from operator import add, mul, sub
from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import check_writable, write
from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.puzzle import NUMBERS, TARGETS, Puzzle, Split, check_size, checked, judge, split_of
from grpo_cli.core.task.solver import magnitudes, needs_parentheses, solve

ENUMERABLE = 4  # the most numbers of which all puzzles are soon enumerated and solved
SAMPLED = 2_000  # distinct puzzles that stand for a split of more numbers
MOST_DRAWS = 200_000  # to find them

_OPERATIONS: tuple[Callable[[int, int], int], ...] = (add, sub, mul)

FIELDS = ("numbers", "target", "split", "solution")


def enumerate_puzzles(numbers: int = 3, split: Split | None = None) -> Iterator[Puzzle]:
    """Every solvable puzzle of that many numbers from 1 to 10 and a target from 1 to 100, once.

    Numbers are sorted; puzzles are ordered by (numbers, target).
    """
    check_size(numbers)
    for drawn in combinations_with_replacement(NUMBERS, numbers):
        if split in (None, split_of(drawn)):
            yield from (Puzzle(drawn, target) for target in sorted(magnitudes(drawn)) if target in TARGETS)


def generate(count: int, *, numbers: int = 3, split: Split | None = None, seed: int = 0) -> list[Puzzle]:
    """`count` puzzles as the original draws them: `((a op b) op c) ...` at random, kept if 1 <= value <= 100."""
    check_size(numbers)
    return list(islice(_draws(numbers, split, seed), count))


def puzzle_set(numbers: int, split: Split) -> list[Puzzle]:
    """All puzzles of a split; of more than four numbers a fixed sample, each puzzle once."""
    if numbers <= ENUMERABLE:
        return list(enumerate_puzzles(numbers=numbers, split=split))
    distinct: dict[Puzzle, Puzzle] = {}
    for puzzle in islice(_draws(numbers, split, seed=0), MOST_DRAWS):
        distinct.setdefault(puzzle.canonical, puzzle)
        if len(distinct) == SAMPLED:
            break
    return list(distinct.values())


def _draws(size: int, split: Split | None, seed: int) -> Iterator[Puzzle]:
    """Puzzles at random without end."""
    below = _below(random.Random(seed))
    while True:
        drawn = tuple([NUMBERS[below(len(NUMBERS))] for _ in range(size)])
        target = drawn[0]
        for number in drawn[1:]:
            target = _OPERATIONS[below(len(_OPERATIONS))](target, number)
        if target in TARGETS and split in (None, split_of(drawn)):
            yield Puzzle(drawn, target)


def _below(rng: random.Random) -> Callable[[int], int]:
    """A uniform index below `limit`, drawn as `random.choice` does, in half the time."""
    bits = rng.getrandbits

    def below(limit: int) -> int:
        width = limit.bit_length()
        drawn = bits(width)
        while drawn >= limit:
            drawn = bits(width)
        return drawn

    return below


def json_line(puzzle: Puzzle) -> str:
    """The puzzle with one solution as a line of a puzzle file, without its newline."""
    return f'{{"numbers": [{", ".join(map(str, puzzle.numbers))}], {_rest_of_line(puzzle.canonical)}'


@cache
def _rest_of_line(puzzle: Puzzle) -> str:
    solutions = solve(puzzle)
    if not solutions:
        raise CountdownError(f"{puzzle.target} cannot be made from {list(puzzle.numbers)}")
    return json.dumps({"target": puzzle.target, "split": puzzle.split, "solution": solutions[0]})[1:]


def write_puzzles(path: Path, puzzles: Iterable[Puzzle], *, overwrite: bool = False) -> None:
    """Write a puzzle file as a whole or not at all."""
    check_writable(path, overwrite=overwrite)
    write(path, "".join(f"{json_line(puzzle)}\n" for puzzle in puzzles).encode())


def read_puzzles(path: Path) -> list[Puzzle]:
    """The puzzles of a puzzle file; CountdownError names the file and the line of whatever is wrong."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CountdownError(f"cannot read `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise CountdownError(f"`{path}`, line {line}: not UTF-8") from error
    if not text:
        raise CountdownError(f"`{path}` is empty", "write puzzles with `countdown gen-data --out FILE`")
    lines = text.removesuffix("\n").split("\n")
    return [_read_line(line, f"`{path}`, line {number}") for number, line in enumerate(lines, 1)]


def _read_line(line: str, place: str) -> Puzzle:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CountdownError(f"{place}: not JSON") from error
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        raise CountdownError(f"{place}: a puzzle is an object with the fields {', '.join(FIELDS)}")
    numbers, target, solution = record["numbers"], record["target"], record["solution"]
    if not isinstance(numbers, list) or any(type(number) is not int for number in (*numbers, target)):
        raise CountdownError(f"{place}: `numbers` is a list of whole numbers, `target` a whole number")
    try:
        puzzle = checked(numbers, target)
    except CountdownError as error:
        raise CountdownError(f"{place}: {error.message}") from error
    if record["split"] != puzzle.split:
        raise CountdownError(f"{place}: {numbers} belongs to the split `{puzzle.split}`")
    if not isinstance(solution, str) or judge(puzzle, parse(solution)) != "correct":
        raise CountdownError(f"{place}: `solution` does not make {target} from {numbers}")
    return puzzle


@dataclass(frozen=True)
class Summary:
    """What a set of puzzles is like; `needs_parentheses` is a share, `solutions` a mean per puzzle."""

    count: int
    train: int
    val: int
    target_min: int
    target_median: float
    target_max: int
    needs_parentheses: float
    solutions: float
    duplicates: int


def summarize(puzzles: Sequence[Puzzle]) -> Summary:
    """Counts, targets and difficulty of a non-empty set of puzzles.

    Puzzles with the same numbers, in any order, and the same target are one puzzle: `duplicates` counts the surplus.
    """
    if not puzzles:
        raise CountdownError("there are no puzzles to summarize")
    counts = Counter(puzzle.canonical for puzzle in puzzles)
    train = sum(count for puzzle, count in counts.items() if puzzle.split == "train")
    targets = [puzzle.target for puzzle in puzzles]
    difficulty = [(needs_parentheses(puzzle), len(solve(puzzle))) for puzzle in counts]
    return Summary(
        count=len(puzzles),
        train=train,
        val=len(puzzles) - train,
        target_min=min(targets),
        target_median=statistics.median(targets),
        target_max=max(targets),
        needs_parentheses=statistics.fmean([needs for needs, _ in difficulty], counts.values()),
        solutions=statistics.fmean([solutions for _, solutions in difficulty], counts.values()),
        duplicates=len(puzzles) - len(counts),
    )
