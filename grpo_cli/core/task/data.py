"""Puzzles in bulk: enumerate, generate, and write them as JSON Lines."""

import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement, islice
from itertools import count as forever
from operator import add, mul, sub
from pathlib import Path

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import check_writable, write
from grpo_cli.core.task.files import in_format
from grpo_cli.core.task.puzzle import Puzzle, Side, check_size, split_of
from grpo_cli.core.task.rules import ORIGINAL, Rules
from grpo_cli.core.task.solver import solution, targets
from grpo_cli.core.task.task import Message

Ask = Callable[[Puzzle], list[Message]]

ENUMERABLE = 4, 1_000  # most numbers, and choices of them, for which all puzzles are enumerated
SAMPLED = 2_000  # distinct puzzles that represent a larger split
MOST_DRAWS = 200_000  # to find them, and draws in a row that may fail
MOST_TRIES = 4_000_000  # draws for such a sample, also failed ones
_APPLY: dict[str, Callable[[int | Fraction, int], int | Fraction]] = {"+": add, "-": sub, "*": mul, "/": Fraction}


def is_enumerable(size: int, rules: Rules = ORIGINAL) -> bool:
    """Whether all puzzles of that many numbers can be enumerated quickly."""
    return size <= ENUMERABLE[0] and rules.choices(size) <= ENUMERABLE[1]


def enumerate_puzzles(numbers: int = 3, split: Side | None = None, rules: Rules = ORIGINAL) -> Iterator[Puzzle]:
    """Every solvable puzzle of that many numbers, once.

    Numbers are sorted; puzzles are ordered by (numbers, target).
    """
    check_size(numbers)
    for drawn in combinations_with_replacement(rules.numbers, numbers):
        if split in (None, split_of(drawn)):
            yield from (Puzzle(drawn, target) for target in sorted(targets(drawn, rules)))


def generate(
    count: int,
    *,
    numbers: int = 3,
    split: Side | None = None,
    seed: int = 0,
    rules: Rules = ORIGINAL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Puzzle]:
    """`count` random puzzles as in the original: `((a op b) op c) ...`, kept if the target is allowed."""
    check_size(numbers)
    puzzles: list[Puzzle] = []
    for puzzle in islice(_draws(numbers, split, seed, rules), count):
        puzzles.append(puzzle)
        progress(len(puzzles), count)
    if len(puzzles) < count:
        raise CountdownError(f"{MOST_DRAWS:,} draws in a row made no such puzzle", "allow more numbers or targets")
    return puzzles


@cache
def puzzle_set(numbers: int, split: Side, rules: Rules = ORIGINAL) -> list[Puzzle]:
    """All puzzles of a split, or a fixed sample if there are too many, each puzzle once."""
    if is_enumerable(numbers, rules):
        return list(enumerate_puzzles(numbers, split, rules))
    distinct: dict[Puzzle, Puzzle] = {}
    for puzzle in islice(_draws(numbers, split, 0, rules, tries=MOST_TRIES), MOST_DRAWS):
        distinct.setdefault(puzzle.canonical, puzzle)
        if len(distinct) == SAMPLED:
            break
    return list(distinct.values())


def sampling_note(size: int, rules: Rules = ORIGINAL) -> str | None:
    """A sentence for the user if `puzzle_set` is a sample."""
    if is_enumerable(size, rules):
        return None
    space = f"{size} numbers from {rules.min_number} to {rules.max_number}"
    return f"{space}: too many puzzles to enumerate, each split is a fixed sample of up to {SAMPLED:,}"


def _draws(size: int, split: Side | None, seed: int, rules: Rules, *, tries: int | None = None) -> Iterator[Puzzle]:
    """Random puzzles, until MOST_DRAWS in a row fail, or after `tries` draws."""
    below, numbers, allowed = _below(random.Random(seed)), rules.numbers, rules.targets
    operations = [_APPLY[name] for name in rules.operations]
    missed = 0
    for _ in forever() if tries is None else range(tries):
        if missed == MOST_DRAWS:
            return
        drawn = tuple([numbers[below(len(numbers))] for _ in range(size)])
        chosen = [operations[below(len(operations))] for _ in drawn[1:]]
        missed += 1
        if split is not None and split != split_of(drawn):
            continue
        target: int | Fraction = drawn[0]
        for operation, number in zip(chosen, drawn[1:], strict=True):
            target = operation(target, number)
        whole = int(target)  # `Fraction in range` is a linear search
        if whole == target and whole in allowed:
            yield Puzzle(drawn, whole)
            missed = 0


def _below(rng: random.Random) -> Callable[[int], int]:
    """A uniform index below `limit`, the same as `random.choice` would draw, in half the time."""
    bits = rng.getrandbits

    def below(limit: int) -> int:
        width = limit.bit_length()
        drawn = bits(width)
        while drawn >= limit:
            drawn = bits(width)
        return drawn

    return below


def json_line(puzzle: Puzzle, rules: Rules = ORIGINAL) -> str:
    """The puzzle with one solution as a line of a puzzle file, without the newline."""
    return f'{{"numbers": [{", ".join(map(str, puzzle.numbers))}], {_rest_of_line(puzzle.canonical, rules)}'


@cache
def _rest_of_line(puzzle: Puzzle, rules: Rules) -> str:
    solved = solution(puzzle, rules)
    if solved is None:
        raise CountdownError(f"{puzzle.target} cannot be made from {list(puzzle.numbers)}")
    return json.dumps({"target": puzzle.target, "split": puzzle.split, "solution": solved})[1:]


def _trainer_line(puzzle: Puzzle, index: int, messages: list[Message]) -> str:
    truth = {"numbers": list(puzzle.numbers), "target": puzzle.target}
    return json.dumps(
        {
            "data_source": "countdown",
            "prompt": messages,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": puzzle.split, "index": index},
        }
    )


def puzzle_lines(puzzles: Iterable[Puzzle], rules: Rules = ORIGINAL, ask: Ask | None = None) -> list[str]:
    """Lines of JSON with a solution each or, given what makes the prompts, in the columns of verl and TinyZero."""
    if ask is None:
        return [json_line(puzzle, rules) for puzzle in puzzles]
    return [_trainer_line(puzzle, index, ask(puzzle)) for index, puzzle in enumerate(puzzles)]


def write_puzzles(
    path: Path,
    puzzles: Iterable[Puzzle],
    *,
    overwrite: bool = False,
    rules: Rules = ORIGINAL,
    ask: Ask | None = None,
) -> None:
    """Write a puzzle file atomically: JSON Lines, CSV or Parquet by its extension."""
    check_writable(path, overwrite=overwrite)
    write(path, in_format(path.suffix.lower(), puzzle_lines(puzzles, rules, ask)))


@dataclass(frozen=True)
class Summary:
    """Statistics of a set of puzzles."""

    count: int
    train: int
    val: int
    target_min: int
    target_median: float
    target_max: int
    duplicates: int


def summarize(puzzles: Sequence[Puzzle]) -> Summary:
    """Counts and targets of a non-empty set of puzzles.

    Puzzles with the same target and the same numbers in any order are duplicates; `duplicates` counts the surplus.
    """
    train, targets = sum(puzzle.split == "train" for puzzle in puzzles), [puzzle.target for puzzle in puzzles]
    return Summary(
        count=len(puzzles),
        train=train,
        val=len(puzzles) - train,
        target_min=min(targets),
        target_median=statistics.median(targets),
        target_max=max(targets),
        duplicates=len(puzzles) - len({puzzle.canonical for puzzle in puzzles}),
    )
