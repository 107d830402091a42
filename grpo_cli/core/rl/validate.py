"""Evaluation during training: the val cell and the suite's cells, always on the same problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.dist.ranks import Solo
from grpo_cli.core.evals.evaluate import Evaluation, evaluate, puzzles_of
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.sampling.params import SamplingParams
from grpo_cli.core.task.suite import Cell, cell, weighted_mean
from grpo_cli.core.task.task import Task


class Validation:
    """Evaluates the policy greedily on every cell."""

    def __init__(
        self,
        policy: Policy,
        settings: Settings,
        ranks: Solo,
        fit: MicroBatch,
        *,
        task: Task,
        progress: Callable[[str, int, int], None],
        poll: Callable[[], None],
    ) -> None:
        self.policy, self.settings, self.ranks, self.fit = policy, settings, ranks, fit
        self.task, self.progress, self.poll = task, progress, poll
        self.val = Cell("val", settings.task.numbers, settings.task.style)
        self.weights: Mapping[str, float] = settings.suite.get(settings.train.eval_suite, {})
        cells = {self.val.name: self.val, **{name: cell(name) for name in self.weights}}
        self.puzzles = {one: puzzles_of(one, settings.train.eval_puzzles, task) for one in cells.values()}

    @property
    def count(self) -> int:
        """Problems of the val cell."""
        return len(self.puzzles[self.val])

    def run(self, clock: Clock) -> dict[str, Evaluation]:
        """Evaluate every cell, the val cell first."""
        results: dict[str, Evaluation] = {}
        with clock.phase("eval"):
            results[self.val.name] = self.evaluate(self.val)
            with clock.phase("suite"):
                results |= {one.name: self.evaluate(one) for one in self.puzzles if one != self.val}
        return results

    def metrics(self, results: Mapping[str, Evaluation]) -> dict[str, float]:
        """Metrics of an evaluation: val_accuracy, and with a suite the accuracy of each cell and their mean."""
        metrics = {"val_accuracy": results[self.val.name].accuracy}
        if self.weights:
            accuracies = {name: results[name].accuracy for name in self.weights}
            metrics |= {f"suite/{name}": value for name, value in accuracies.items()}
            metrics["suite_mean"] = weighted_mean(accuracies, self.weights)
        return metrics

    def evaluate(self, one: Cell) -> Evaluation:
        """Evaluate one cell."""
        return evaluate(
            self.policy,
            self.puzzles[one],
            SamplingParams(self.settings.train.max_new_tokens, temperature=0.0),
            style=one.style,
            split=one.split,
            task=self.task,
            batch_size=self.settings.eval.batch_size,
            fit=self.fit,
            ranks=self.ranks,
            progress=partial(self.progress, f"evaluating {one.name}: puzzle"),
            on_token=self._sampled,
        )

    def _sampled(self, _: int) -> None:
        self.fit.check()
        self.poll()
