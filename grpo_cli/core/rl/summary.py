"""Summary of a finished training: accuracies, the peak of each cell, time after the best step, time by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_cli.core.evals.evaluate import Evaluation
from grpo_cli.core.evals.statistics import changes, mcnemar
from grpo_cli.core.perf.roofline import COMPUTED
from grpo_cli.core.rl.state import Progress
from grpo_cli.core.run.folder import Run


def summary(progress: Progress, evaluation: Evaluation, run: Run) -> dict[str, object]:
    """The summary of a finished progress."""
    metrics = run.metrics()
    spent = {name: sum(line.get(f"time/{name}", 0.0) for line in metrics) for name in ("total", "eval", "suite")}
    return {
        "steps": progress.step,
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
        "phases": (by_phase := phases(metrics)),
        "verdict": verdict(by_phase),
    }


def _peaks(run: Run, best_step: int) -> dict[str, dict[str, float]]:
    """Per cell: accuracy at first, at its peak, of the best model, and last, with a test of peak against last."""
    peaks: dict[str, dict[str, float]] = {}
    for name, history in run.evaluations().items():
        steps = list(history)
        peak = max(steps, key=lambda step: history[step].accuracy)
        kept, last = history.get(best_step, history[steps[-1]]), history[steps[-1]]
        gained, lost = changes(kept.solved, last.solved)
        peaks[name] = {
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
    return peaks


def phases(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Time by phase: `seconds`, `share` of all, and `floor` in seconds if the phase has one.

    `matrix`: seconds of its operations at the hardware's full rate. Empty for old runs that did not log phases.
    """

    def total(key: str) -> float:
        return sum(line.get(key, 0.0) for line in metrics if "floor_share" in line)

    names = ("prefill", "decode", "score", "reference", "update", "optimizer", "reduce", "wait")
    spent = {name: total(f"time/{name}") for name in names}
    if not total("time/total"):
        return {}
    spent["other"] = total("time/total") - sum(spent.values())
    spent["evaluation"] = sum(line.get("time/eval", 0.0) for line in metrics)
    whole = sum(spent.values())
    by_phase = {name: {"seconds": seconds, "share": seconds / whole} for name, seconds in spent.items() if seconds > 0}
    for name in COMPUTED:
        if name in by_phase:
            by_phase[name] |= {"floor": total(f"floor/{name}"), "matrix": total(f"arithmetic/{name}")}
    return by_phase


# Share of the floor above which a phase is hardware-bound; share of the time above which a phase is mentioned.
AT_THE_FLOOR, MATTERS = 0.4, 0.25
REMEDIES = {
    "prefill": "use shorter prompts",
    "decode": "more completions per prompt cost less than proportionally",
    "reference": "`--beta 0` needs no reference",
    "update": "use micro-batches as large as memory allows",
    "optimizer": "a larger batch amortises it",
    "evaluation": "a larger `--eval-every` or fewer `--eval-puzzles` save it",
}


def verdict(by_phase: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence on the bottleneck of each phase that takes a quarter of the time, or of the longest if none does.

    Rules, in order: faster than its floor, the data stays in a cache; at 40 % of the floor or more, it is bound by
    arithmetic or memory bandwidth, whichever determines its floor; below, by the overhead of each operation.
    """
    order = sorted(by_phase, key=lambda name: -by_phase[name]["seconds"])
    return [_sentence(name, by_phase[name]) for name in order if by_phase[name]["share"] >= MATTERS or name == order[0]]


def _sentence(name: str, phase: Mapping[str, float]) -> str:
    takes = f"{name} takes {phase['share']:.0%} of the time"
    remedy = f"; {REMEDIES[name]}" if name in REMEDIES else ""
    if not phase.get("floor"):
        return takes + remedy
    reached, arithmetic = phase["floor"] / phase["seconds"], phase["matrix"] >= phase["floor"] / 2
    what = "matrix rate" if arithmetic else "memory bandwidth"
    if reached > 1:
        return f"{takes}, at {reached:.0%} of the {what}: the data stays in a cache"
    at = f"{takes}, at {reached:.0%} of the {what}"
    if reached >= AT_THE_FLOOR:
        spare = remedy if name == "decode" and not arithmetic else ""
        return f"{at}: bound by {'arithmetic' if arithmetic else 'reading and writing memory'}{spare}"
    return f"{at}: bound by the overhead of each operation{remedy}"
