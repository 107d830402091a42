"""`countdown gen-data`: write puzzles as JSON Lines, CSV or Parquet."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from grpo_cli.cli import options
from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.run.folder import require_outside_runs
from grpo_cli.core.task.data import enumerate_puzzles, generate, is_enumerable, json_line, summarize, write_puzzles
from grpo_cli.core.task.puzzle import Side
from grpo_cli.ui import tables

COMPRESSED = (".bz2", ".gz", ".xz", ".zip", ".zst")


def run(
    ctx: typer.Context,
    *,
    split: Side | None,
    count: int,
    seed: int,
    out: Path | None,
    overwrite: bool,
    config: Path | None,
) -> None:
    """Enumerate all puzzles, or sample `count` of them."""
    out = None if out == Path("-") else out
    if out is not None and out.suffix in COMPRESSED:
        raise CountdownError(f"`{out}` would not be compressed", "end its name in `.jsonl`, `.csv` or `.parquet`")
    if out is not None:
        require_outside_runs(out)
    flags = {**options.flags(ctx), "task.task": "countdown", "task.puzzles": "none"}
    task = resolve(flags=flags, environ=os.environ, config_file=config).settings.task
    numbers, rules = task.numbers, task.rules
    if not count and not is_enumerable(numbers, rules):
        raise CountdownError(
            f"puzzles of {numbers} numbers from {rules.min_number} to {rules.max_number} are too many to enumerate",
            "draw some with `--count`",
        )
    if count:
        with tables.progress("drawing puzzles", quiet=False) as progress:
            puzzles = generate(count, numbers=numbers, split=split, seed=seed, rules=rules, progress=progress)
    else:
        puzzles = list(enumerate_puzzles(numbers, split, rules))
    if not puzzles:
        raise CountdownError("these rules allow no puzzle", "allow more numbers, targets or operations")
    if out is None:
        for puzzle in puzzles:
            print(json_line(puzzle, rules))
    else:
        write_puzzles(out, puzzles, overwrite=overwrite, rules=rules)
    tables.gen_data_summary(summarize(puzzles, rules), out)
