"""`countdown solve`: ask a model one puzzle."""

from __future__ import annotations

from pathlib import Path

import typer

from grpo_cli.cli.checks import choose
from grpo_cli.cli.models import load
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.sampling.params import SamplingParams
from grpo_cli.core.sampling.rollout import Engine, uniforms
from grpo_cli.core.task.countdown import task_of
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.question import read_question
from grpo_cli.core.task.solver import solve
from grpo_cli.core.task.task import Score
from grpo_cli.ui import tables
from grpo_cli.ui import text as show


def run(
    ctx: typer.Context,
    *,
    question: list[str],
    model: str | None,
    attempts: int,
    show_solution: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Sample until an answer is correct; exit with 1 if none is."""
    chosen = choose(ctx, config, model)
    rules = chosen.settings.task.rules
    puzzle = read_question(" ".join(question), rules)
    solutions = solve(puzzle, rules)
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


def _attempt(policy: Policy, puzzle: Puzzle, settings: Settings, *, attempts: int, quiet: bool) -> tuple[Score, int]:
    """Make up to `attempts` attempts, the first greedy by default: (last score, number of attempts)."""
    import torch

    if policy.model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # a small model loses more to thread synchronisation than it gains
    task, style, limit = task_of(settings), settings.task.style, settings.eval.max_new_tokens
    tokens = policy.encode(task.prompt(puzzle, style))
    engine = Engine(policy)
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
