"""`countdown solve`: ask a model one puzzle."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_cli.cli.gen_data import RULES
from grpo_cli.cli.models import RUNNING, choose, load
from grpo_cli.cli.options import ConfigFile, Json, completion
from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.model.policy import Policy
    from grpo_cli.core.task.puzzle import Puzzle
    from grpo_cli.core.task.rules import Rules
    from grpo_cli.core.task.task import Score

SETTINGS = ("preset", "runs", "task.style", *RULES)
SETTINGS += (*RUNNING, "eval.max_new_tokens", "eval.temperature")


def solve(
    ctx: typer.Context,
    question: Annotated[list[str], typer.Argument(metavar="PUZZLE", help='"4 7 3 = 25", or "4,7,3 -> 25"')],
    model: Annotated[
        str | None,
        typer.Option(help="run, folder, hub id, or `builtin`", metavar="<name>", autocompletion=completion("model")),
    ] = None,
    attempts: Annotated[
        int, typer.Option(min=1, help="completions to sample until one is correct", metavar="<int>")
    ] = 1,
    show_solution: Annotated[bool, typer.Option("--show-solution", help="show the solver's own solutions too")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Ask a model a puzzle; by default the newest run's best model.

    The first attempt is greedy, later ones are sampled. Example: countdown solve "4 7 3 = 25"
    """
    from grpo_cli.core.task import solver
    from grpo_cli.core.task.question import parse, read_question
    from grpo_cli.ui import tables

    asked = " ".join(question)
    parse(asked)
    chosen = choose(ctx, config, [model] if model is not None else None)[0]
    rules = chosen.settings.task.rules
    puzzle = read_question(asked, rules)
    solutions = solver.solve(puzzle, rules)
    if not solutions:
        use = "every number exactly" if rules.use_all else "each number at most"
        raise CountdownError(
            f"{show.question(puzzle.numbers, puzzle.target)} has no solution with {rules.operations}, {use} once",
            _other_rules(puzzle, rules),
            exit_code=1,
        )
    if model is None and not as_json:
        show.note(f"model: {chosen.name}")
    result, tried = _attempt(load(chosen), puzzle, chosen.settings, attempts=attempts, quiet=as_json)
    if as_json:
        answer = {"numbers": list(puzzle.numbers), "target": puzzle.target, "answer": result.answer}
        answer |= {"correct": result.correct, "reason": result.reason, "attempts": tried, "solutions": solutions}
        show.json_object(answer)
    else:
        tables.answer(result.answer or "")
        tables.verdict(puzzle, result)
        if show_solution or not result.correct:
            tables.solutions(puzzle, solutions)
    if not result.correct:
        raise typer.Exit(1)


def _other_rules(puzzle: Puzzle, rules: Rules) -> str:
    """The flags under which a puzzle has a solution, as few as possible."""
    from grpo_cli.core.task.rules import OPERATIONS
    from grpo_cli.core.task.solver import solution

    for use_all in sorted({rules.use_all, False}, reverse=True):
        for operations in (rules.operations, "+-", "+*", "+-*", "+*/", OPERATIONS):
            wider = replace(rules, operations=operations, use_all=use_all)
            if set(operations) >= set(rules.operations) and (solved := solution(puzzle, wider)):
                added = [f'`--operations "{operations}"`'] * (operations != rules.operations)
                added += ["`--no-use-all`"] * (use_all != rules.use_all)
                return f"{solved} with {' and '.join(added)}"
    return "change a number"


def _attempt(policy: Policy, puzzle: Puzzle, settings: Settings, *, attempts: int, quiet: bool) -> tuple[Score, int]:
    """Make up to `attempts` attempts, the first greedy by default: (last score, number of attempts)."""
    import torch

    from grpo_cli.core.rollout.engine import uniforms
    from grpo_cli.core.rollout.make import make_engine
    from grpo_cli.core.rollout.params import SamplingParams
    from grpo_cli.core.task.countdown import Countdown
    from grpo_cli.ui import tables

    if not settings.model.threads and policy.model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # a small model loses more to thread synchronisation than it gains
    task, style, limit = Countdown(settings.task.rules), settings.task.style, settings.eval.max_new_tokens
    tokens = policy.encode(task.prompt(puzzle, style))
    engine = make_engine(policy, settings, max_new_tokens=limit)
    engine.update_weights()
    for attempt in range(attempts):
        temperature = settings.eval.temperature or (1.0 if attempt else 0.0)
        if attempts > 1 and not quiet:
            how = f"at temperature {temperature:g}" if temperature else "greedy"
            show.note(f"attempt {attempt + 1} of {attempts}, {how}")
        uniform = uniforms(attempt, 0, [0], 1, limit) if temperature else None
        pieces = engine.stream(tokens, SamplingParams(limit, temperature), uniform=uniform)
        text = "".join(pieces) if quiet else tables.reasoning(pieces)
        result = task.score(text, puzzle, style=style)
        if result.correct:
            break
    return result, attempt + 1
