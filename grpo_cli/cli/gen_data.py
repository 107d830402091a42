"""`countdown gen-data`: write puzzles as JSON Lines, CSV or Parquet."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import typer

from grpo_cli.cli.options import ConfigFile, Overwrite, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.rules import Rules

RULES = tuple(f"task.{rule.name}" for rule in fields(Rules))
SETTINGS = ("task.numbers", *RULES)
COMPRESSED = (".bz2", ".gz", ".xz", ".zip", ".zst")


def gen_data(
    ctx: typer.Context,
    split: Annotated[Literal["train", "val"] | None, typer.Option(help="write only this split; default: both")] = None,
    count: Annotated[
        int, typer.Option(min=0, help="number of puzzles to sample; 0 enumerates all", metavar="<int>")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="random seed", metavar="<int>")] = 0,
    out: Annotated[Path | None, typer.Option(help="file to write; default: stdout", metavar="<file>")] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Write puzzles with solutions as JSON Lines, CSV or Parquet, by the file's extension.

    Example: countdown gen-data --split val --out val.jsonl
    """
    from grpo_cli.core.run.folder import require_outside_runs
    from grpo_cli.core.task import data
    from grpo_cli.ui import tables

    out = None if out == Path("-") else out
    if out is not None and out.suffix in COMPRESSED:
        raise CountdownError(f"`{out}` would not be compressed", "end its name in `.jsonl`, `.csv` or `.parquet`")
    if out is not None:
        require_outside_runs(out)
    task = resolve(ctx, config, task__task="countdown", task__puzzles="none").settings.task
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
    if out is None:
        for puzzle in puzzles:
            print(data.json_line(puzzle, rules))
    else:
        data.write_puzzles(out, puzzles, overwrite=overwrite, rules=rules)
    tables.gen_data_summary(data.summarize(puzzles, rules), out)
