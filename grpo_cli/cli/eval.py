"""`countdown eval`: measure models on the same puzzles, and compare them puzzle by puzzle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_cli.cli.launch import joined
from grpo_cli.cli.models import RUNNING, ModelChoice, choose, load, micro_batch_of
from grpo_cli.cli.options import ConfigFile, Json, Overwrite, completion, flags, read_files, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import check_writable, require_ending, write_lines
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.evals.compare import SuitePaired
    from grpo_cli.core.evals.evaluate import SuiteResult
    from grpo_cli.core.task.task import Task
    from grpo_cli.core.world import World

SETTINGS = ("preset", "runs", "task", *RUNNING, "eval", "ranks")
SUITE_CELL = ("task.style", "task.numbers", "eval.split")  # settings that a suite's cells determine
_DECODING = ("eval.limit", "eval.samples", "eval.temperature", "eval.max_new_tokens")


def eval(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL", help="runs, folders, hub ids, or `builtin`", autocompletion=completion("model")
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="evaluate on every cell of this suite, a table `suite.NAME` of the settings",
            metavar="<name>",
            autocompletion=completion("suite"),
        ),
    ] = None,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown tables, for a report")] = False,
    out: Annotated[
        Path | None, typer.Option(help="write every completion to this file, as JSON Lines", metavar="<file>")
    ] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Measure accuracy on all val puzzles; by default of the newest run's best model.

    Several models are evaluated with the settings of the first, and compared with it puzzle by puzzle. With --suite,
    --limit counts puzzles per cell. Example: countdown eval builtin first --suite transfer
    """
    _check(ctx, suite, as_json=as_json, as_markdown=as_markdown, out=out, overwrite=overwrite)
    chosen, weights = choose(ctx, config, models), None
    if suite is not None:
        weights = _weights(ctx, config, suite)
    else:
        chosen = [_whole_file(ctx, model) for model in chosen]
    first = chosen[0].settings
    if first.eval.samples > 1 and first.eval.temperature == 0:
        raise CountdownError(
            f"`--samples {first.eval.samples}` needs sampling: greedy completions of a puzzle are all equal",
            "set `--temperature 1` too",
        )
    task = read_files(first)
    with joined(first) as world:
        results = _evaluate(chosen, task, weights, quiet=as_json or not world.is_first, world=world)
    if world.is_first:
        _report(suite, results, as_json=as_json, as_markdown=as_markdown, out=out)


def _check(
    ctx: typer.Context, suite: str | None, *, as_json: bool, as_markdown: bool, out: Path | None, overwrite: bool
) -> None:
    """Raise CountdownError for conflicting flags and for a file that cannot be written."""
    from grpo_cli.core.config.resolve import flag
    from grpo_cli.core.run.folder import require_outside_runs

    if as_json and as_markdown:
        raise CountdownError("`--json` and `--markdown` exclude each other", "leave one of them out")
    if out is not None:
        require_ending(out, ".jsonl", ".json")
        require_outside_runs(out)
        check_writable(out, overwrite=overwrite)
    for key in SUITE_CELL if suite is not None else ():
        if key in flags(ctx):
            raise CountdownError(f"`{flag(key)}` is set by the cells of a suite", "leave out either it or `--suite`")


def _weights(ctx: typer.Context, config: Path | None, suite: str) -> Mapping[str, float]:
    """The cells of a suite with their weights."""
    from grpo_cli.core.config.resolve import require_suite

    settings = resolve(ctx, config).settings
    require_suite(settings, suite, "`--suite`")
    return settings.suite[suite]


def _whole_file(ctx: typer.Context, chosen: ModelChoice) -> ModelChoice:
    """With `--puzzles` and no `--split`, the whole file is evaluated, unless its rows say which are val."""
    from grpo_cli.core.task.files import load_puzzles

    settings, task = chosen.settings, chosen.settings.task
    if "task.puzzles" not in flags(ctx) or "eval.split" in flags(ctx):
        return chosen
    if task.puzzles == "none" or task.val_puzzles != "none":
        return chosen
    if load_puzzles(Path(task.puzzles), task.rules, unmarked="train").rows["val"]:
        return chosen
    whole = task.model_copy(update={"puzzles": "none", "val_puzzles": task.puzzles})
    return replace(chosen, settings=settings.model_copy(update={"task": whole}))


def _report(
    suite: str | None, results: Sequence[SuiteResult], *, as_json: bool, as_markdown: bool, out: Path | None
) -> None:
    """Compare the results with the first; show them, and write every completion to `out`."""
    from grpo_cli.core.evals.compare import suite_paired
    from grpo_cli.ui import eval_tables

    pairs = [pair for result in results[1:] if (pair := suite_paired(results[0], result))]
    if len(results) > 1 and not pairs:
        show.note("models with several completions per puzzle are not compared in pairs")
    eval_tables.leaks(results)
    if as_json:
        show.json_object(_json(suite, results, pairs))
    elif as_markdown:
        eval_tables.markdown(suite, results, pairs)
    else:
        _show(suite, results, pairs)
    if out is not None:
        records = (record for result in results for cell in result.cells for record in cell.records())
        write_lines(out, [json.dumps(record) for record in records])


def _show(suite: str | None, results: Sequence[SuiteResult], pairs: Sequence[SuitePaired]) -> None:
    from grpo_cli.ui import eval_tables

    if suite is not None:
        eval_tables.suite(suite, results)
        for pair in pairs:
            eval_tables.suite_paired(pair)
    elif len(results) == 1:
        eval_tables.evaluation(results[0].cells[0])
    else:
        eval_tables.comparison(results)
        for pair in pairs:
            for paired in pair.cells.values():
                eval_tables.paired(paired)


def _evaluate(
    chosen: Sequence[ModelChoice], asked: Task, weights: Mapping[str, float] | None, *, quiet: bool, world: World
) -> list[SuiteResult]:
    """Evaluate all models on the same puzzles: a suite's cells, or without `weights` the one cell of the settings."""
    from grpo_cli.core.evals import contamination
    from grpo_cli.core.evals.evaluate import Evaluator, common_size, puzzles_of
    from grpo_cli.core.rollout.make import make_engine
    from grpo_cli.core.rollout.params import SamplingParams
    from grpo_cli.core.task.suite import Cell, cell
    from grpo_cli.ui import tables

    task, settings = chosen[0].settings.task, chosen[0].settings.eval
    suite = list(map(cell, weights or []))
    cells = suite or [Cell(settings.split, task.numbers, task.style)]
    _note_differences(chosen, _DECODING if suite else SUITE_CELL + _DECODING)
    known = [contamination.known(model.source, Path(model.settings.runs)) for model in chosen]
    for sentence in asked.notes(sorted({one.numbers for one in cells})):
        show.note(sentence)
    puzzles = {one: puzzles_of(one, settings.limit, asked, sized=bool(suite)) for one in cells}
    if not suite:
        puzzles = {replace(one, numbers=common_size(own)): own for one, own in puzzles.items()}
        weights = {one.name: 1.0 for one in puzzles}
    results: list[SuiteResult] = []
    with tables.progress("evaluating", quiet=quiet) as advance:

        def progress(count: int, total: int) -> None:
            advance(len(results) * total + count, len(chosen) * total)

        for model, trained_on in zip(chosen, known, strict=True):
            result = Evaluator(
                make_engine(load(model), model.settings, max_new_tokens=settings.max_new_tokens, world=world),
                SamplingParams.evaluation(settings),
                asked,
                settings.batch_size,
                micro_batch=micro_batch_of(model.settings, settings.batch_size),
                world=world,
                known=trained_on,
            ).evaluate_suite(puzzles, weights or {}, progress=progress)
            results.append(result)
    return results


def _note_differences(chosen: Sequence[ModelChoice], keys: Sequence[str]) -> None:
    """Report where a model's own settings differ from those of the first, which apply to all."""
    first, *others = [{key: reduce(getattr, key.split("."), model.settings) for key in keys} for model in chosen]
    differing = [
        f"{model.name} has {key} {own[key]}, not {first[key]}"
        for model, own in zip(chosen[1:], others, strict=True)
        for key in keys
        if own[key] != first[key]
    ]
    if differing:
        show.note(f"all are evaluated with the settings of {chosen[0].name}; {'; '.join(differing)}")


def _json(suite: str | None, results: Sequence[SuiteResult], pairs: Sequence[SuitePaired]) -> dict[str, object]:
    """One model's evaluation; several models with their comparisons; or a suite."""
    if suite is not None:
        first = results[0]
        protocol = {"suite": suite, "decoding": first.decoding, "protocol": first.protocol}
        compared = [item for pair in pairs for item in pair.to_json()]
        models = [result.to_json() for result in results]
        return {**protocol, "weights": dict(first.weights), "models": models, "paired": compared}
    evaluations = [result.cells[0].to_json() for result in results]
    compared = [paired.to_json() for pair in pairs for paired in pair.cells.values()]
    return evaluations[0] if len(evaluations) == 1 else {"models": evaluations, "paired": compared}
