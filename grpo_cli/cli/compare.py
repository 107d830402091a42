"""`countdown compare`: compare the evaluations that runs have stored, puzzle by puzzle, without loading a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_cli.cli.models import warn_of_bug
from grpo_cli.cli.options import ConfigFile, Json, completion, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.metrics import best_step
from grpo_cli.ui import text

if TYPE_CHECKING:
    from grpo_cli.core.run.folder import Run
    from grpo_cli.core.run.logs import Evaluated

SETTINGS = ("runs",)


def compare(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="runs", autocompletion=completion("run"))],
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Compare the best models of runs, puzzle by puzzle, by the evaluations of their trainings; loads no model.

    Each run is compared with the first; a single one with its own base model. Example: countdown compare first second
    """
    from grpo_cli.core.run.folder import Run, at
    from grpo_cli.ui import tables

    root = Path(resolve(ctx, config).settings.runs)
    first, *others = runs = [Run.open(root, name) for name in names]
    best = {run.name: best_step(run.metrics()) for run in runs}
    for run in runs:
        if not best[run.name]:
            raise CountdownError(
                f"run `{run.name}` has not evaluated a trained model yet", f"resume it with `{run.resume_command}`"
            )
    stored = {run.name: _stored(run, best[run.name]) for run in runs}
    pairs = [(first.name, stored[first.name], run.name, stored[run.name]) for run in others]
    if not pairs:
        pairs = [(f"{first.name}, step 0", _stored(first, 0), first.name, stored[first.name])]
    rows = []
    for pair in pairs:
        rows += (own := _compared(*pair))
        if not own:
            command = f"countdown eval {first.name} {pair[2]}{at(root)}"
            problem = f"`{pair[0]}` and `{pair[2]}` have no evaluations on the same puzzles"
            raise CountdownError(problem, f"evaluate their models: `{command}`")
    _note_settings(runs)
    if as_json:
        text.json_object({"paired": rows})
    else:
        tables.compared(rows)


def _stored(run: Run, step: int) -> dict[str, Evaluated]:
    """The evaluations of a step, by cell; those on dev chose the best step, so they compare nothing."""
    by_cell = run.evaluations()
    return {cell: own[step] for cell, own in by_cell.items() if step in own and not cell.startswith("dev ")}


def _compared(
    first: str, own: Mapping[str, Evaluated], second: str, other: Mapping[str, Evaluated]
) -> list[dict[str, object]]:
    """A row for each cell that both evaluated on the same puzzles."""
    from grpo_cli.core.evals.statistics import changes, holm, mcnemar

    shared = [(own[cell], other[cell]) for cell in own if cell in other and own[cell].puzzles == other[cell].puzzles]
    counted = [changes(one.solved, two.solved) for one, two in shared]
    tested = [mcnemar(gained, lost) for gained, lost in counted]
    return [
        {"first": first, "second": second, "cell": one.cell, "count": one.count}
        | {"first_accuracy": one.accuracy, "second_accuracy": two.accuracy, "gained": gained, "lost": lost}
        | {"p_value": p_value, "p_holm": corrected}
        for (one, two), (gained, lost), p_value, corrected in zip(shared, counted, tested, holm(tested), strict=True)
    ]


def _note_settings(runs: Sequence[Run]) -> None:
    """Report planted bugs, and runs that were evaluated with other token limits than the first."""

    limits = [run.settings.eval.max_new_tokens for run in runs]
    for run, limit in zip(runs, limits, strict=True):
        warn_of_bug(run)
        if limit != limits[0]:
            text.note(f"{run.name} was evaluated with up to {limit} tokens, {runs[0].name} with {limits[0]}")
