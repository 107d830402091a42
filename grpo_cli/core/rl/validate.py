"""Evaluation during training, on fixed problems: dev selects the best model; val and a suite are reported.

With a suite, dev has each size and style that has a weight in the suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.evals.evaluate import Evaluation, Evaluator, common_size, puzzles_of
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.context import Context
from grpo_cli.core.task.suite import Cell, cell, weighted_mean
from grpo_cli.core.task.task import Split


class Validation:
    """Evaluates the policy greedily on every cell."""

    def __init__(self, evaluator: Evaluator, settings: Settings, clock: Clock, context: Context) -> None:
        self.evaluator, self.clock, self.context = evaluator, clock, context
        self.weights: Mapping[str, float] = settings.suite.get(settings.train.eval_suite, {})
        limit, task = settings.train.eval_puzzles, evaluator.task
        splits: tuple[Split, ...] = ("val",) if self.weights else ("val", "dev")
        asked = [Cell(split, settings.task.numbers, settings.task.style) for split in splits]
        named = [(one, puzzles_of(one, limit, task)) for one in asked]  # all sizes that a file has
        self.puzzles = {replace(one, numbers=common_size(own)): own for one, own in named}
        self.val, *own_dev = self.puzzles
        self.dev = _on_dev(self.weights) or dict.fromkeys(own_dev, 1.0)
        for one in (*self.dev, *map(cell, self.weights)):
            if one not in self.puzzles:
                self.puzzles[one] = puzzles_of(one, limit, task, sized=True)

    @property
    def count(self) -> int:
        """Problems of the val cell."""
        return len(self.puzzles[self.val])

    def run(self) -> dict[str, Evaluation]:
        """Evaluate every cell, the val cell first."""
        with self.clock.phase("eval"):
            results = {one.name: self.evaluate(one) for one in (self.val, *self.dev)}
            with self.clock.phase("suite"):
                results |= {one.name: self.evaluate(one) for one in self.puzzles if one.name not in results}
        return results

    def metrics(self, results: Mapping[str, Evaluation]) -> dict[str, float]:
        """Metrics of an evaluation: val and dev accuracy; with a suite, each cell's accuracy and their mean."""
        dev = {one.name: weight for one, weight in self.dev.items()}
        metrics = {"val_accuracy": results[self.val.name].accuracy}
        metrics["dev_accuracy"] = weighted_mean({name: results[name].accuracy for name in dev}, dev)
        if self.weights:
            accuracies = {name: results[name].accuracy for name in self.weights}
            metrics |= {f"suite/{name}": value for name, value in accuracies.items()}
            metrics["suite_mean"] = weighted_mean(accuracies, self.weights)
        return metrics

    def evaluate(self, one: Cell) -> Evaluation:
        """Evaluate one cell."""
        place, puzzles = f"evaluating {one.name}, cell {[*self.puzzles].index(one) + 1} of {len(self.puzzles)}", 0

        def advance(done: int, _: int) -> None:
            nonlocal puzzles
            puzzles = done

        def on_token(token: int) -> None:
            phase = f"{place}, {puzzles} of {len(self.puzzles[one])} puzzles done: token"
            self.context.observer.progress(phase, token, self.evaluator.params.max_new_tokens)
            self.context.poll()

        evaluator = replace(self.evaluator, on_token=on_token)
        return evaluator.evaluate(
            self.puzzles[one], style=one.style, split=one.split, numbers=one.numbers, progress=advance
        )


def _on_dev(weights: Mapping[str, float]) -> dict[Cell, float]:
    """The dev cells of the sizes and styles that have a weight in the suite."""
    dev: dict[Cell, float] = {}
    for name, weight in weights.items():
        one = replace(cell(name), split="dev")
        if weight:
            dev[one] = dev.get(one, 0.0) + weight
    return dev
