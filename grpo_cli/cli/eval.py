"""`countdown eval`: measure models on the same puzzles, and compare them puzzle by puzzle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import typer

from grpo_cli.cli.checks import SUITE_CELL, Chosen, choose, evaluated, resolve_for_model
from grpo_cli.cli.models import at_once, joined, load
from grpo_cli.core.config.resolve import require_suite
from grpo_cli.core.evals import contamination
from grpo_cli.core.evals.compare import SuitePaired, suite_paired
from grpo_cli.core.evals.evaluate import Evaluator, SuiteResult, common_size, puzzles_of
from grpo_cli.core.files import write_lines
from grpo_cli.core.sampling.params import SamplingParams
from grpo_cli.core.sampling.rollout import Engine
from grpo_cli.core.task.countdown import task_of
from grpo_cli.core.task.suite import Cell, cell
from grpo_cli.core.world import World
from grpo_cli.ui import eval_tables, tables
from grpo_cli.ui import text as show

_DECODING = ("eval.limit", "eval.samples", "eval.temperature", "eval.max_new_tokens")


def run(
    ctx: typer.Context,
    *,
    models: list[str] | None,
    suite: str | None,
    as_json: bool,
    as_markdown: bool,
    out: Path | None,
    overwrite: bool,
    config: Path | None,
) -> None:
    """Evaluate every model with the settings of the first; show, compare and write the results."""
    weights = None
    if suite is not None:
        settings = resolve_for_model(ctx, config).settings
        require_suite(settings, suite, "`--suite`")
        weights = settings.suite[suite]
    chosen = [choose(ctx, config, name) for name in models] if models else [choose(ctx, config, None)]
    if suite is None:
        chosen = [evaluated(ctx, model) for model in chosen]
    with joined(chosen[0].settings) as world:
        results = _evaluate(chosen, weights, quiet=as_json or not world.is_first, world=world)
    if not world.is_first:
        return
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
    chosen: Sequence[Chosen], weights: Mapping[str, float] | None, *, quiet: bool, world: World
) -> list[SuiteResult]:
    """Evaluate all models on the same puzzles: a suite's cells, or without `weights` the one cell of the settings."""
    task, settings = chosen[0].settings.task, chosen[0].settings.eval
    suite = list(map(cell, weights or []))
    cells = suite or [Cell(settings.split, task.numbers, task.style)]
    _note_differences(chosen, _DECODING if suite else SUITE_CELL + _DECODING)
    known = [contamination.known(model.source, Path(model.settings.runs)) for model in chosen]
    asked = task_of(chosen[0].settings)
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
                Engine(load(model)),
                SamplingParams.evaluation(settings),
                asked,
                settings.batch_size,
                micro_batch=at_once(model.settings, settings.batch_size),
                world=world,
                known=trained_on,
            ).evaluate_suite(puzzles, weights or {}, progress=progress)
            results.append(result)
    return results


def _note_differences(chosen: Sequence[Chosen], keys: Sequence[str]) -> None:
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
