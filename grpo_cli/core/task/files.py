"""Puzzle files: JSON Lines, JSON arrays, CSV and Parquet, as `gen-data` writes them or as other projects do."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import require_regular
from grpo_cli.core.task.expression import ascii_operators, parse
from grpo_cli.core.task.puzzle import Puzzle, checked, judge
from grpo_cli.core.task.rules import ORIGINAL, Rules
from grpo_cli.core.task.solver import solution
from grpo_cli.core.task.task import Split, divided

SPLITS: tuple[Split, ...] = get_args(Split)
FIELDS = ("numbers", "target", "split", "solution")
TRIED = 1_000  # puzzles of a file that are solved to find out whether its puzzles can be


@dataclass(frozen=True)
class PuzzleFile:
    """The puzzles of a file, each once, by the split of their rows; `duplicates` counts those left out."""

    path: Path
    rows: Mapping[Split, Sequence[Puzzle]]
    duplicates: int
    sha256: str

    @cached_property
    def splits(self) -> Mapping[Split, Sequence[Puzzle]]:
        """The puzzles by split; dev is a fixed part of train, unless rows say `dev`."""
        if self.rows["dev"]:
            return self.rows
        train, dev = divided(self.rows["train"])
        return {**self.rows, "train": train, "dev": dev}

    def puzzles(self, split: Split) -> list[Puzzle]:
        """The puzzles of a split; CountdownError if there are none."""
        if not self.splits[split]:
            hint = "puzzles with an odd number are train, all others val, unless a column `split` says so"
            if split == "dev":
                hint = "dev is part of train: give at least 2 train puzzles, or a file with `--dev-puzzles`"
            raise CountdownError(f"`{self.path}` has no {split} puzzles", hint)
        return list(self.splits[split])

    def __str__(self) -> str:
        counts = ", ".join(f"{len(own):,} {split}" for split, own in self.splits.items() if own)
        return f"{self.path}: {counts} puzzles, {self.duplicates:,} duplicates left out, SHA-256 {self.sha256[:12]}"


@cache
def load_puzzles(
    path: Path, rules: Rules = ORIGINAL, *, every: Split | None = None, unmarked: Split | None = None
) -> PuzzleFile:
    """Read a puzzle file. Raises CountdownError naming the line of an error or of an unsolvable puzzle.

    `every` is the split of all rows, `unmarked` that of rows that name none; by default it follows from the numbers.
    """
    require_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CountdownError(f"cannot read `{path}`: {error.strerror}") from error
    splits: dict[Puzzle, Split] = {}
    chosen: dict[Puzzle, tuple[Puzzle, str]] = {}
    count = 0
    for place, row in _rows(path, data):
        count += 1
        puzzle, split = _read(row, place, rules)
        split = every or split or unmarked or puzzle.split
        if splits.setdefault(puzzle.canonical, split) != split:
            other = splits[puzzle.canonical]
            raise CountdownError(f"{place}: {puzzle} is a {other} and a {split} puzzle", "keep it in one split")
        chosen.setdefault(puzzle.canonical, (puzzle, place))
    if not count:
        raise CountdownError(f"`{path}` has no puzzles", "write some with `countdown gen-data --out FILE`")
    _require_solvable(list(chosen.values()), rules)
    by_split: dict[Split, Sequence[Puzzle]] = {
        split: tuple(puzzle for key, (puzzle, _) in chosen.items() if splits[key] == split) for split in SPLITS
    }
    return PuzzleFile(path, by_split, count - len(chosen), hashlib.sha256(data).hexdigest())


def _require_solvable(puzzles: Sequence[tuple[Puzzle, str]], rules: Rules) -> None:
    tried = puzzles[:: -(-len(puzzles) // TRIED)]
    unsolved = [(puzzle, place) for puzzle, place in tried if solution(puzzle, rules) is None]
    if unsolved:
        puzzle, place = unsolved[0]
        raise CountdownError(
            f"{len(unsolved):,} of {len(tried):,} puzzles tried have no solution, first {place}: {puzzle}",
            f"the rules allow {rules.operations}: change `--operations` or `--no-use-all`, or remove these puzzles",
        )


def _read(row: dict[str, Any], place: str, rules: Rules) -> tuple[Puzzle, Split | None]:
    """The puzzle of a row, and its split if given."""
    numbers, target = _columns(row, place)
    if not isinstance(numbers, list) or type(target) is not int or any(type(number) is not int for number in numbers):
        raise CountdownError(f"{place}: `numbers` (or `nums`) is a list of whole numbers, `target` a whole number")
    try:
        puzzle = checked(numbers, target, rules)
    except CountdownError as error:
        raise CountdownError(f"{place}: {error.message}") from error
    split = row.get("split") or None
    if split not in (None, *SPLITS):
        raise CountdownError(f"{place}: `split` is `train`, `dev` or `val`")
    answer = row.get("solution")
    if answer is not None and not (isinstance(answer, str) and _solves(answer, puzzle, rules)):
        hint = f"the rules allow {rules.operations}; give those that the file was written with, such as `--operations`"
        raise CountdownError(f"{place}: `solution` does not make {target} from {numbers}", hint)
    return puzzle, split


def _columns(row: dict[str, Any], place: str) -> tuple[Any, Any]:
    """Numbers and target of a row."""
    names = [name for name in ("numbers", "nums") if row.get(name) is not None]
    missing = ["`numbers` (or `nums`)"] * (not names) + ["`target`"] * ("target" not in row)
    if missing:
        columns = ", ".join(f"`{name}`" for name in list(row)[:8]) or "nothing"
        raise CountdownError(
            f"{place}: there is no {' and no '.join(missing)}", f"rename a column; the row has {columns}"
        )
    return row[names[0]], row["target"]


def _solves(answer: str, puzzle: Puzzle, rules: Rules) -> bool:
    """Whether a solution is right, alone or as an equation."""
    sides = [parse(side, rules.operations) for side in ascii_operators(answer).split("=")]
    true = all(side is not None and side.value == puzzle.target for side in sides)
    return true and any(judge(puzzle, side, rules) == "correct" for side in sides)


def _rows(path: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its line number."""
    if path.suffix.lower() == ".parquet":
        yield from ((f"`{path}`, row {index}", row) for index, row in enumerate(_parquet(path, data), 1))
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = data.count(b"\n", 0, error.start) + 1
        raise CountdownError(f"`{path}`, line {lines}: not UTF-8") from error
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
        return
    whole = text.lstrip().startswith("[")
    pieces = [text] if whole else text.rstrip().split("\n") if text.strip() else []
    parsed = [_json(piece, f"`{path}`, line {index}") for index, piece in enumerate(pieces, 1)]
    for index, row in enumerate(parsed[0] if whole else parsed, 1):
        place = f"`{path}`, {'entry' if whole else 'line'} {index}"
        if not isinstance(row, dict):
            raise CountdownError(f"{place}: a puzzle is an object with the fields {', '.join(FIELDS)}")
        yield place, row


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except KeyError as error:
        raise CountdownError(f"{place}: a field is given twice") from error
    except (ValueError, RecursionError) as error:
        raise CountdownError(f"{place}: not JSON") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; KeyError if a key occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise KeyError
    return row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file; lists are written as `[3, 5, 2]` or `3 5 2`."""
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
        if len(set(columns)) < len(columns):
            raise CountdownError(f"`{path}` has two columns of the same name", "rename or remove one")
        for row in reader:
            place = f"`{path}`, line {reader.line_num}"
            parsed: dict[str, Any] = {key: value or None for key, value in row.items() if key}
            for key in ("numbers", "nums", "target"):
                if isinstance(parsed.get(key), str):
                    parsed[key] = _whole_numbers(parsed[key], single=key == "target")
            yield place, parsed
    except csv.Error as error:
        raise CountdownError(f"`{path}`, line {reader.line_num}: not CSV: {error}") from error


def _whole_numbers(text: str, *, single: bool) -> list[int] | int | str:
    """The numbers of a cell; its text if it has others."""
    words = text.strip("[]() ").replace(",", " ").split()
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words) or (single and len(words) != 1):
        return text
    numbers = [int(word) for word in words]
    return numbers[0] if single else numbers


def _parquet(path: Path, data: bytes) -> list[dict[str, Any]]:
    parquet = _pyarrow()
    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:
        raise CountdownError(f"`{path}` is not a Parquet file: {str(error).splitlines()[0]}") from error
    return rows


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        hint = 'install it with `pip install "countdown-grpo[parquet]"`, or use JSON Lines or CSV'
        raise CountdownError("Parquet files need pyarrow", hint) from error
    return pyarrow.parquet


def in_format(suffix: str, lines: Sequence[str]) -> bytes:
    """Puzzle lines of JSON in the format of a file name's suffix: CSV, Parquet, or JSON Lines for any other."""
    if suffix not in (".csv", ".parquet"):
        return "".join(f"{line}\n" for line in lines).encode()
    rows = [json.loads(line) for line in lines]
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    import pyarrow

    buffer = io.BytesIO()
    _pyarrow().write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()
