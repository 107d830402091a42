"""Evaluation during training, on fixed problems: dev selects the best model; val and a suite are reported.

Decoding is greedy; `eval_samples` adds completions of the val problems, sampled as in training.

With a suite, dev has each size and style that has a weight in the suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.evals.evaluate import Evaluation, Evaluator, common_size, puzzles_of
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.suite import Cell, cell, weighted_mean
from grpo_cli.core.task.task import Split


class Validation:
    """Evaluates the policy on every cell."""

    def __init__(self, evaluator: Evaluator, settings: Settings, clock: Clock, context: Context) -> None:
        self.evaluator, self.clock, self.context = evaluator, clock, context
        self.weights: Mapping[str, float] = settings.suite.get(settings.train.eval_suite, {})
        limit, task, train = settings.train.eval_puzzles, evaluator.task, settings.train
        self.sampling = replace(SamplingParams.training(train), num_generations=train.eval_samples)
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
            results = self.evaluate(self.val, *self.dev)
            with self.clock.phase("suite"):
                results |= self.evaluate(*(one for one in self.puzzles if one.name not in results))
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

    def sampled(self) -> dict[str, float]:
        """Metrics of completions of the val problems, the same draws in every evaluation; {} if none are asked for."""
        if not self.sampling.num_generations:
            return {}
        with self.clock.phase("eval"):
            result = self.evaluate(self.val, sampling=self.sampling)[self.val.name]
        solved = result.accuracy if result.pass_at_k is None else result.pass_at_k
        bounds = dict(zip(("val_sampled_low", "val_sampled_high"), result.interval, strict=True))
        return {"val_sampled": result.accuracy, **bounds, "val_pass_at_k": solved}

    def evaluate(self, *cells: Cell, sampling: SamplingParams | None = None) -> dict[str, Evaluation]:
        """Evaluate these cells, greedily unless `sampling` says how; the results by the cells' names."""
        doing, puzzles = "sampling" if sampling else "evaluating", {one: self.puzzles[one] for one in cells}
        done, total = 0, sum(map(len, puzzles.values()))

        def advance(count: int, _: int) -> None:
            nonlocal done
            done = count

        def on_token(token: int) -> None:
            phase = f"{doing}, {done} of {total} puzzles done: token"
            self.context.observer.progress(phase, token, self.evaluator.params.max_new_tokens)
            self.context.poll()

        evaluator = replace(self.evaluator, params=sampling or self.evaluator.params, on_token=on_token)
        return {one.name: result for one, result in evaluator.evaluate_cells(puzzles, progress=advance).items()}


def _on_dev(weights: Mapping[str, float]) -> dict[Cell, float]:
    """The dev cells of the sizes and styles that have a weight in the suite."""
    dev: dict[Cell, float] = {}
    for name, weight in weights.items():
        one = replace(cell(name), split="dev")
        if weight:
            dev[one] = dev.get(one, 0.0) + weight
    return dev
