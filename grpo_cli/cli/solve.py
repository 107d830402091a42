"""`countdown solve`: ask a model one puzzle."""

from __future__ import annotations

from pathlib import Path

import typer

from grpo_cli.cli.models import choose, load
from grpo_cli.core.config.settings import Eval
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.sampling.rollout import stream, uniforms
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.question import read_question
from grpo_cli.core.task.scoring import Score, score
from grpo_cli.core.task.solver import solve
from grpo_cli.ui import tables
from grpo_cli.ui import text as show


def run(
    ctx: typer.Context,
    *,
    question: str,
    model: str | None,
    attempts: int,
    show_solution: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Sample until an answer is right; exit with 1 if none is."""
    puzzle = read_question(question)
    solutions = solve(puzzle)
    if not solutions:
        raise CountdownError(
            f"{show.question(puzzle.numbers, puzzle.target)} has no solution", "change a number", exit_code=1
        )
    chosen = choose(ctx, config, model)
    style, settings = chosen.settings.task.style, chosen.settings.eval
    result, tried = _attempt(load(chosen), puzzle, style, settings, attempts=attempts, quiet=as_json)
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


def _attempt(
    policy: Policy, puzzle: Puzzle, style: Style, settings: Eval, *, attempts: int, quiet: bool
) -> tuple[Score, int]:
    """Ask up to `attempts` times, the first greedily by default: (last score, number of attempts)."""
    tokens, limit = policy.encode(prompt(puzzle, style)), settings.max_new_tokens
    for attempt in range(attempts):
        temperature = settings.temperature or (1.0 if attempt else 0.0)
        uniform = uniforms(attempt, 0, [0], 1, limit) if temperature else None
        pieces = stream(policy, tokens, max_new_tokens=limit, temperature=temperature or 1.0, uniform=uniform)
        text = "".join(pieces) if quiet else tables.reasoning(pieces)
        result = score(text, puzzle, style=style)
        if result.correct:
            break
    return result, attempt + 1
