"""Rebuild the built-in model: `python -m grpo_cli.cli.recipe`. `core/builtin/recipe` defines its training data.

Writes the model where `builtin` is loaded from, then measures its accuracy, which takes another minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grpo_cli.core.builtin.recipe import Recipe, make, stages
from grpo_cli.core.evals.evaluate import Evaluation, Evaluator
from grpo_cli.core.model.load import BUILTIN, load
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.data import puzzle_set
from grpo_cli.core.task.puzzle import Side
from grpo_cli.ui import text as show

MAX_NEW_TOKENS = 400


def main() -> None:
    """Run the recipe from scratch, save the model, and print its accuracy."""
    arguments = argparse.ArgumentParser(prog="python -m grpo_cli.cli.recipe", description=main.__doc__)
    arguments.add_argument("--out", type=Path, default=BUILTIN, help="folder to write (default: the package's own)")
    arguments.add_argument("--seed", type=int, default=Recipe.seed)
    arguments.add_argument("--search-steps", type=int, default=Recipe.search_steps, help="fewer: a weaker model")
    arguments.add_argument("--give-up-steps", type=int, default=Recipe.give_up_steps)
    given = arguments.parse_args()
    recipe = Recipe(seed=given.seed, search_steps=given.search_steps, give_up_steps=given.give_up_steps)
    if given.out == BUILTIN and recipe != Recipe(seed=given.seed):
        arguments.error("another model would replace the package's own: name a folder with --out")
    write(recipe, given.out)
    for split, temperature in (("val", 0.0), ("val", 1.0), ("train", 1.0)):
        report(measure(given.out, split, temperature))  # type: ignore[arg-type]


def write(recipe: Recipe, folder: Path) -> None:
    """Run the recipe with progress bars and save the model in float16, which rounds its weights less than bfloat16."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=show.err) as bars:
        tasks = {stage.name: bars.add_task(stage.name, total=stage.steps, loss=0.0) for stage in stages(recipe)}
        model, tokenizer = make(recipe, lambda name, step, loss: bars.update(tasks[name], completed=step, loss=loss))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    show.note(f"wrote {model.num_parameters():,} parameters to {folder}")


def measure(folder: Path, split: Side, temperature: float) -> Evaluation:
    """Accuracy on all val puzzles, or on every seventh train puzzle."""
    puzzles = puzzle_set(3, split)[:: 1 if split == "val" else 7]
    evaluator = Evaluator(LocalEngine(load(str(folder))), SamplingParams(MAX_NEW_TOKENS, temperature), batch_size=128)
    return evaluator.evaluate(puzzles, style="one-shot", split=split)


def report(result: Evaluation) -> None:
    """Print the accuracy and the reasons of the scores."""
    decoding = f"temperature {result.temperature:g}" if result.temperature else "greedy"
    shares = ", ".join(f"{reason} {count / result.count:.1%}" for reason, count in result.reasons.items())
    show.note(f"{result.split}, {decoding}: {result.accuracy:.1%} of {result.count} puzzles; {shares}")


if __name__ == "__main__":
    main()
