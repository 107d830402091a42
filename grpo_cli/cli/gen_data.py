"""`countdown gen-data`: write puzzles as JSON Lines, CSV or Parquet."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from grpo_cli.cli.options import ConfigFile, Overwrite, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import require_ending
from grpo_cli.core.task.prompts import Style, plain, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import Rules
from grpo_cli.core.task.task import Message

RULES = tuple(f"task.{rule.name}" for rule in fields(Rules))
SETTINGS = ("task.numbers", "task.style", *RULES)


def gen_data(
    ctx: typer.Context,
    split: Annotated[Literal["train", "val"] | None, typer.Option(help="write only this split; default: both")] = None,
    count: Annotated[
        int, typer.Option(min=0, help="number of puzzles to sample; 0 enumerates all", metavar="<int>")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="random seed", metavar="<int>")] = 0,
    out: Annotated[Path | None, typer.Option(help="file to write; default: stdout", metavar="<file>")] = None,
    columns: Annotated[
        Literal["countdown", "verl", "tinyzero"], typer.Option(help="columns: this program's, verl's or TinyZero's")
    ] = "countdown",
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Write puzzles with solutions as JSON Lines, CSV or Parquet, by the file's extension.

    Example: countdown gen-data --split val --out val.jsonl
    """
    from grpo_cli.core.task import data
    from grpo_cli.ui import tables

    out = None if out == Path("-") else out
    if out is not None:
        _check(out, columns)
    resolved = resolve(ctx, config, {"task.task": "countdown", "task.puzzles": "none"})
    task = resolved.settings.task
    if columns == "countdown" and resolved.sources["task.style"].startswith("flag "):
        raise CountdownError("`--style` changes nothing: these columns hold no prompt", "add `--columns verl`")
    numbers, rules = task.numbers, task.rules
    if not count and not data.is_enumerable(numbers, rules):
        raise CountdownError(
            f"puzzles of {numbers} numbers from {rules.min_number} to {rules.max_number} are too many to enumerate",
            "draw some with `--count`",
        )
    if count:
        with tables.progress("drawing puzzles", quiet=False) as progress:
            puzzles = data.generate(count, numbers=numbers, split=split, seed=seed, rules=rules, progress=progress)
    else:
        puzzles = list(data.enumerate_puzzles(numbers, split, rules))
    if not puzzles:
        raise CountdownError("these rules allow no puzzle", "allow more numbers, targets or operations")
    ask = None if columns == "countdown" else partial(_messages, columns, task.style, rules)
    if out is None:
        print(*data.puzzle_lines(puzzles, rules, ask), sep="\n")
    else:
        data.write_puzzles(out, puzzles, overwrite=overwrite, rules=rules, ask=ask)
    tables.gen_data_summary(data.summarize(puzzles), out)


def _messages(columns: str, style: Style, rules: Rules, puzzle: Puzzle) -> list[Message]:
    messages = prompt(puzzle, style, rules)
    return plain(messages) if columns == "tinyzero" else messages


def _check(out: Path, columns: str) -> None:
    """Raise CountdownError for a file that would not hold what its name says, or that is in a run."""
    from grpo_cli.core.run.folder import require_outside_runs

    require_ending(out, ".jsonl", ".json", ".csv", ".parquet")
    if out.suffix.lower() == ".csv" and columns != "countdown":
        raise CountdownError(f"CSV cannot hold the nested columns of {columns}", "end the name in `.parquet`")
    require_outside_runs(out)
