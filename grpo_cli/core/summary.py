"""What a finished training came to: its accuracies, when each cell peaked, what going on cost, where the time went."""

from __future__ import annotations

from grpo_cli.core.evaluate import Evaluation
from grpo_cli.core.run import Run
from grpo_cli.core.state import Training
from grpo_cli.core.statistics import changes, mcnemar


def summary(training: Training, evaluation: Evaluation, run: Run) -> dict[str, object]:
    """What a finished training came to."""
    metrics = run.metrics()
    spent = {name: sum(line.get(f"time/{name}", 0.0) for line in metrics) for name in ("total", "eval", "suite")}
    return {
        "steps": training.step,
        "puzzles": evaluation.count,
        "overlap": evaluation.overlap,
        "base_accuracy": training.base_accuracy,
        "final_accuracy": evaluation.accuracy,
        "final_interval": list(evaluation.interval),
        "best_accuracy": training.best_accuracy,
        "best_step": training.best_step,
        "bad_steps": training.bad_steps,
        "seconds": {"training": spent["total"], "evaluation": spent["eval"], "suite": spent["suite"]},
        "seconds_after_best": sum(
            line.get("time/total", 0.0) + line.get("time/eval", 0.0)
            for line in metrics
            if line["step"] > training.best_step
        ),
        "peaks": _peaks(run, training.best_step),
    }


def _peaks(run: Run, best_step: int) -> dict[str, dict[str, float]]:
    """Of each cell: accuracy at first, at its peak, of the model that is kept, and last, against which it is tested."""
    found: dict[str, dict[str, float]] = {}
    for name, history in run.evaluations().items():
        steps = list(history)
        peak = max(steps, key=lambda step: history[step].accuracy)
        kept, last = history.get(best_step, history[steps[-1]]), history[steps[-1]]
        gained, lost = changes(kept.solved, last.solved)
        found[name] = {
            "count": last.count,
            "start": history[steps[0]].accuracy,
            "step": peak,
            "accuracy": history[peak].accuracy,
            "kept": kept.accuracy,
            "last": last.accuracy,
            "gained": gained,
            "lost": lost,
            "p_value": mcnemar(gained, lost),
        }
    return found
