"""What pure bf16 weights lose compared with float32 masters: trainings of the built-in model.

    python benchmarks/precision.py             train missing runs, print the table, draw the curves
    python benchmarks/precision.py --report    print and draw from existing runs

The trainings are those of `study.py`, with 8-bit AdamW in both precisions, so only the weights differ. The learning
rate is the peak after five warm-up steps. Differences are paired by seed, as in the study.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from measured import table
from study import HERE, VAL, Runs, finish, percent, spread, train

from grpo_cli.ui.figures import COLOURS

RATES = ("2e-6", "1e-5", "3e-5", "1e-4")
PRECISIONS = ("bf16-master", "bf16")
SEEDS = (0, 1, 2)
STEPS, WARM_UP = 30, 5


def condition(precision: str, rate: str) -> str:
    return f"{precision}-{rate}"


def options(precision: str, rate: str) -> str:
    flags = f"--precision {precision} --learning-rate {rate} --optimizer adamw8bit"
    return f"{flags} --num-iterations {STEPS} --eval-every 5 --warmup-steps {WARM_UP}"


def changed(runs: Runs, name: str) -> list[float]:
    """Mean share of the weights that a step changed, after the warm-up, by seed."""
    return [
        fmean(line["weights_changed"] for line in runs.metrics(name, seed) if line["step"] > WARM_UP) for seed in SEEDS
    ]


def report(runs: Runs) -> str:
    """The table: share of weights changed per step, and accuracy after thirty steps."""
    head = ["learning rate", "weights moved by a step: master", "bf16", "val accuracy: before", "master", "bf16"]
    rows = []
    for rate in RATES:
        names = [condition(precision, rate) for precision in PRECISIONS]
        last = [runs.accuracies(name, VAL, STEPS) for name in names]
        start = fmean(runs.accuracies(names[0], VAL, 0))
        moved = [percent(fmean(changed(runs, name))) for name in names]
        rows.append(
            [rate, *moved, percent(start), *map(spread, last), runs.compared(VAL, (names[0], STEPS), (names[1], STEPS))]
        )
    return table([*head, "difference (95 %)"], rows)


def draw(runs: Runs, path: Path) -> None:
    """Val accuracy by step at each learning rate and precision; a thin line per seed."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, rate in zip(panels.flat, RATES, strict=True):
        for colour, precision in zip(COLOURS, PRECISIONS, strict=False):
            seeds = [runs.evaluations(condition(precision, rate), seed)[VAL] for seed in SEEDS]
            steps = list(seeds[0])
            values = [[found[step].accuracy for step in steps] for found in seeds]
            for each in values:
                axes.plot(steps, each, color=colour, alpha=0.3, linewidth=1)
            mean = [fmean(at) for at in zip(*values, strict=True)]
            axes.plot(steps, mean, color=colour, marker="o", label=precision)
        axes.set_title(f"learning rate {rate}", loc="left", fontsize=10)
    finish(figure, panels, "precision of the weights", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"), help="folder of the trainings")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, with a thread each")
    parser.add_argument("--report", action="store_true", help="train nothing")
    asked = parser.parse_args()
    if not asked.report:
        with ThreadPoolExecutor(asked.jobs) as pool:
            jobs = [
                pool.submit(train, asked.runs, condition(precision, rate), options(precision, rate), seed)
                for seed in SEEDS
                for rate in RATES
                for precision in PRECISIONS
            ]
            for job in jobs:
                job.result()
    runs = Runs(asked.runs)
    print(report(runs))
    draw(runs, HERE.parent / "docs" / "study" / "precision.png")


if __name__ == "__main__":
    main()
