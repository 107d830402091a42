"""Summary of a finished training: accuracies, the peak of each cell, time after the best step, time by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_cli.core.evals.evaluate import Evaluation
from grpo_cli.core.evals.statistics import changes, mcnemar
from grpo_cli.core.rl.state import Progress
from grpo_cli.core.run.folder import Run


def summary(progress: Progress, evaluation: Evaluation, run: Run, *, broken: str = "none") -> dict[str, object]:
    """The summary of a finished progress; `broken` names the bug that was planted."""
    metrics = run.metrics()
    spent = {name: sum(line.get(f"time/{name}", 0.0) for line in metrics) for name in ("total", "eval", "suite")}
    return {
        "steps": progress.step,
        "broken": broken,
        "puzzles": evaluation.count,
        "overlap": evaluation.overlap,
        "warm_start": run.warm_start_path.is_dir(),
        "base_accuracy": progress.base_accuracy,
        "final_accuracy": evaluation.accuracy,
        "final_interval": list(evaluation.interval),
        "best_accuracy": progress.best_accuracy,
        "best_dev_accuracy": progress.best_score,
        "best_step": progress.best_step,
        "bad_steps": progress.bad_steps,
        "seconds": {"training": spent["total"], "evaluation": spent["eval"], "suite": spent["suite"]},
        "seconds_after_best": sum(
            line.get("time/total", 0.0) + line.get("time/eval", 0.0)
            for line in metrics
            if line["step"] > progress.best_step
        ),
        "peaks": _peaks(run, progress.best_step),
        "phases": phases(metrics),
    }


def _peaks(run: Run, best_step: int) -> dict[str, dict[str, float | None]]:
    """Per cell: accuracy at first, at its peak, of the best model, and last, with a test of the start against the best.

    Dev cells chose the best step, so they are not tested: their p-value is None.
    """
    peaks: dict[str, dict[str, float | None]] = {}
    for name, history in run.evaluations().items():
        steps = list(history)
        peak = max(steps, key=lambda step: history[step].accuracy)
        kept, last = history.get(best_step, history[steps[-1]]), history[steps[-1]]
        gained, lost = changes(history[steps[0]].solved, kept.solved)
        peaks[name] = {
            "count": last.count,
            "start": history[steps[0]].accuracy,
            "step": peak,
            "accuracy": history[peak].accuracy,
            "kept": kept.accuracy,
            "last": last.accuracy,
            "gained": gained,
            "lost": lost,
            "p_value": None if name.startswith("dev ") else mcnemar(gained, lost),
        }
    return peaks


def phases(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Time by phase: `seconds` and `share` of all."""

    def total(key: str) -> float:
        return sum(line.get(f"time/{key}", 0.0) for line in metrics)

    names = ("prefill", "decode", "score", "reference", "update", "optimizer", "reduce", "wait")
    spent = {name: total(name) for name in names}
    spent["other"] = total("total") - sum(spent.values())
    spent["evaluation"] = total("eval")
    whole = sum(spent.values())
    return {name: {"seconds": seconds, "share": seconds / whole} for name, seconds in spent.items() if seconds > 0}
