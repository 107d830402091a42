"""What transfers, what does not, and when to stop: trainings of the built-in model, at least three seeds per condition.

    python benchmarks/study.py                  train missing runs, print all tables, draw all figures
    python benchmarks/study.py --table styles   print one table from existing runs

Every run is an ordinary `countdown train` on one thread, two at a time; its command is printed, its folder is in
`--runs`, and stopped runs resume. Differences between conditions are paired by seed, with Student's 95 % interval over
seeds. A difference counts only if that interval excludes 0 and the exact McNemar test gives p < 0.05 over the puzzles
that most seeds solve.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from measured import table

from grpo_cli.core.evals.statistics import NOT_SIGNIFICANT, changes, mcnemar, significant
from grpo_cli.core.run.folder import Run
from grpo_cli.core.run.logs import Evaluated
from grpo_cli.ui.figures import COLOURS

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
MORE_SEEDS = {"k3": (0, 1, 2, 3, 4), "original-kl": (0, 1, 2, 3, 4)}  # three were inconclusive for a large difference
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile of Student's t, by number of seeds
SHORT, LONG = 20, 60  # steps
VAL = "val 3 one-shot"
STYLES = ("one-shot", "zero-shot", "natural")
SUITE = [f"val {numbers} {style}" for numbers in (3, 4) for style in STYLES]

CONDITIONS = {
    "one-shot": f"--num-iterations {LONG} --eval-suite study",
    "zero-shot": "--prompt-style zero-shot --eval-suite study",
    "fading": f"--prompt-style 'one-shot -> zero-shot, linear over {SHORT} steps' --eval-suite study",
    "grpo": "--loss-type grpo",
    "dr_grpo": "--loss-type dr_grpo",
    "k3": "--beta 0.05",
    "original-kl": "--beta 0.05 --kl-estimator original",
    "groups-of-4": "--batch-size 16 --num-generations 4",
    "groups-of-16": "--batch-size 4 --num-generations 16",
    "too-fast": "--learning-rate 5e-4 --num-iterations 40 --eval-suite study",
}


def seeds_of(*conditions: str) -> tuple[int, ...]:
    """The seeds that all these conditions were trained with."""
    return min((MORE_SEEDS.get(condition, SEEDS) for condition in conditions), key=len)


# Training


def train(root: Path, condition: str, options: str, seed: int) -> None:
    """Train the run of a condition with its flags, unless it is finished."""
    name = f"{condition}-{seed}"
    if (root / name / "summary.json").exists():
        return
    settings = ["--config", str(HERE / "study.toml"), "--runs", str(root), "--run", name]
    if (root / name / "checkpoints").is_dir():
        arguments = ["--runs", str(root), "--run", name, "--resume"]
    else:
        arguments = [*settings, "--overwrite", "--seed", str(seed), *shlex.split(options)]
    print("countdown train", shlex.join(arguments), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "grpo_cli", "train", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()}")


# Reading


class Runs:
    """The evaluations and metrics of the study's runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, dict[str, dict[int, Evaluated]]] = {}

    def evaluations(self, condition: str, seed: int) -> dict[str, dict[int, Evaluated]]:
        name = f"{condition}-{seed}"
        if name not in self._read:
            self._read[name] = Run.open(self.root, name).evaluations()
        return self._read[name]

    def accuracies(self, condition: str, cell: str, step: int, seeds: Sequence[int] = SEEDS) -> list[float]:
        """Accuracy of each seed."""
        return [self.evaluations(condition, seed)[cell][step].accuracy for seed in seeds]

    def solved(self, condition: str, cell: str, step: int, seeds: Sequence[int]) -> str:
        """Which puzzles most seeds solve, one character per puzzle."""
        marks = zip(*(self.evaluations(condition, seed)[cell][step].solved for seed in seeds), strict=True)
        return "".join("1" if 2 * of_puzzle.count("1") > len(seeds) else "0" for of_puzzle in marks)

    def compared(self, cell: str, one: tuple[str, int], other: tuple[str, int]) -> str:
        """The difference of two (condition, step) on a cell."""
        seeds = seeds_of(one[0], other[0])
        values = [self.accuracies(*_at(cell, which), seeds) for which in (one, other)]
        p_value = mcnemar(*changes(*(self.solved(*_at(cell, which), seeds) for which in (other, one))))
        return compared(*values, p_value=p_value)

    def metrics(self, condition: str, seed: int) -> list[dict[str, float]]:
        return [line for line in Run.open(self.root, f"{condition}-{seed}").metrics() if line["step"] > 0]


def _at(cell: str, which: tuple[str, int]) -> tuple[str, str, int]:
    return which[0], cell, which[1]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def spread(values: Sequence[float]) -> str:
    return f"{percent(fmean(values))} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def compared(values: Sequence[float], others: Sequence[float], *, p_value: float = 0.0) -> str:
    """Mean paired difference, values - others, with half of its 95 % interval, and the verdict."""
    if list(values) == list(others):
        return "the same"
    pairs = [one - other for one, other in zip(values, others, strict=True)]
    mean, half = fmean(pairs), T_QUANTILE[len(pairs)] * stdev(pairs) / len(pairs) ** 0.5
    verdict = NOT_SIGNIFICANT if abs(mean) <= half or not significant(p_value) else "more" if mean > 0 else "less"
    return f"{100 * mean:+.1f} ± {100 * half:.1f}, {verdict}"


# Tables


def styles(runs: Runs) -> str:
    """Train in one style, test in all, with three and four numbers."""
    rows = []
    for cell in SUITE:
        base = runs.accuracies("one-shot", cell, 0)
        trained = {name: runs.accuracies(name, cell, SHORT) for name in ("one-shot", "zero-shot", "fading")}
        shown = [spread(values) for values in trained.values()]
        gain = runs.compared(cell, ("one-shot", SHORT), ("one-shot", 0))
        others = [runs.compared(cell, (name, SHORT), ("one-shot", SHORT)) for name in ("zero-shot", "fading")]
        rows.append([cell, percent(base[0]), *shown, gain, *others])
    head = ["cell", "base", "one-shot", "zero-shot", "fading", "one-shot less base"]
    return table([*head, "zero-shot less one-shot", "fading less one-shot"], rows)


def length(runs: Runs) -> str:
    """Short against long runs, on one-shot prompts."""
    rows = []
    for cell in SUITE:
        steps = {step: runs.accuracies("one-shot", cell, step) for step in range(0, LONG + 1, 10)}
        longer = runs.compared(cell, ("one-shot", LONG), ("one-shot", SHORT))
        rows.append([cell, *(percent(fmean(values)) for values in steps.values()), longer])
    return table(["cell", *(f"step {step}" for step in range(0, LONG + 1, 10)), f"step {LONG} less {SHORT}"], rows)


def stopping(runs: Runs) -> str:
    """Which step each rule picks, chosen on every other puzzle of the suite and judged on the rest."""
    return "\n\n".join(f"**{name}**\n\n{_stopping(runs, name)}" for name in ("one-shot", "too-fast"))


def _stopping(runs: Runs, condition: str) -> str:
    rows = []
    judged: dict[str, list[float]] = {}
    for seed in SEEDS:
        found, metrics = runs.evaluations(condition, seed), runs.metrics(condition, seed)
        steps = [step for step in found[VAL] if step]

        def reward(step: int, metrics: list[dict[str, float]] = metrics) -> float:
            return fmean(line["reward"] for line in metrics if step - 10 < line["step"] <= step)

        def half(step: int, cells: Sequence[str], first: int, found: dict[str, dict[int, Evaluated]] = found) -> float:
            return fmean(found[cell][step].solved[first::2].count("1") / len(found[cell][step].solved[first::2])
                         for cell in cells)  # fmt: skip

        rules: dict[str, Callable[[int], float]] = {
            "highest training reward": reward,
            f"best on {VAL}": lambda step: half(step, [VAL], 0),
            "best on the suite": lambda step: half(step, SUITE, 0),
            "the last step": float,
        }
        for name, rule in rules.items():
            step = max(steps, key=rule)
            result = half(step, SUITE, 1)
            judged.setdefault(name, []).append(result)
            rows.append([name, str(seed), str(step), percent(result), percent(half(step, [VAL], 1))])
    rows.sort(key=lambda row: row[0])
    head = table(["rule", "seed", "step kept", "suite, other half", f"{VAL}, other half"], rows)
    last = judged["the last step"]
    rest = [[name, spread(values), compared(values, last)] for name, values in judged.items() if values is not last]
    return f"{head}\n\n{table(['rule', 'suite, other half', 'less the last step'], rest)}"


def _against_baseline(runs: Runs, names: Sequence[str]) -> str:
    rows = []
    for name in ("one-shot", *names):
        seeds = seeds_of(name)
        lines = [[line for line in runs.metrics(name, seed) if line["step"] <= SHORT] for seed in seeds]
        steps = {step: runs.accuracies(name, VAL, step, seeds) for step in (SHORT // 2, SHORT)}
        cells = [spread(steps[step]) for step in steps]
        pairs = [((name, step), ("one-shot", step)) for step in steps]
        cells += ["" if name == "one-shot" else runs.compared(VAL, *pair) for pair in pairs]
        cells.append(f"{fmean(seed[-1]['kl'] for seed in lines):.4f}")
        cells.append(f"{fmean(fmean(line['zero_variance'] for line in seed) for seed in lines):.2f}")
        cells.append(f"{fmean(fmean(line['completion_length'] for line in seed[-5:]) for seed in lines):.0f}")
        rows.append(["baseline" if name == "one-shot" else name, *cells])
    accuracies = [f"step {step}" for step in (SHORT // 2, SHORT)]
    differences = [f"{words} less baseline" for words in accuracies]
    return table(["condition", *accuracies, *differences, "KL", "zero variance", "tokens, last five"], rows)


def losses(runs: Runs) -> str:
    """Normalisers of the loss; the baseline is dapo."""
    return _against_baseline(runs, ["grpo", "dr_grpo"])


def kl(runs: Runs) -> str:
    """Estimators of the KL at a weight of 0.05; the baseline has 0.001."""
    difference = runs.compared(VAL, ("original-kl", SHORT), ("k3", SHORT))
    against = _against_baseline(runs, ["k3", "original-kl"])
    return f"{against}\n\noriginal-kl less k3, step {SHORT}, {len(MORE_SEEDS['k3'])} seeds: {difference}"


def groups(runs: Runs) -> str:
    """Group sizes, at 64 completions per step; the baseline has groups of 8."""
    return _against_baseline(runs, ["groups-of-4", "groups-of-16"])


TABLES = {table.__name__: table for table in (styles, length, stopping, losses, kl, groups)}


# Figures


def draw_styles(runs: Runs, path: Path) -> None:
    """Accuracy of each cell by step and training style."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, cell in zip(panels.flat, SUITE, strict=True):
        for colour, name in zip(COLOURS, ("one-shot", "zero-shot", "fading"), strict=False):
            steps = [step for step in runs.evaluations(name, 0)[cell] if step <= SHORT]
            seeds = [[runs.evaluations(name, seed)[cell][step].accuracy for step in steps] for seed in SEEDS]
            for values in seeds:
                axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, [fmean(at) for at in zip(*seeds, strict=True)], color=colour, marker="o", label=name)
        axes.set_title(cell, loc="left", fontsize=10)
    finish(figure, panels, "styles trained on", path)


def draw_length(runs: Runs, path: Path) -> None:
    """Reward and the suite's mean in the long runs."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(SEEDS), sharey=True, squeeze=False)
    for axes, seed in zip(panels.flat, SEEDS, strict=True):
        metrics, found = runs.metrics("one-shot", seed), runs.evaluations("one-shot", seed)
        axes.plot([line["step"] for line in metrics], [line["accuracy"] for line in metrics],
                  color=COLOURS[0], alpha=0.4, linewidth=1, label="training accuracy")  # fmt: skip
        for index, (label, cells) in enumerate({VAL: [VAL], "mean of the suite": SUITE}.items(), start=1):
            steps = list(found[VAL])
            means = [fmean(found[cell][step].accuracy for cell in cells) for step in steps]
            axes.plot(steps, means, color=COLOURS[index], marker="o", label=label)
        axes.set_title(f"seed {seed}", loc="left", fontsize=10)
    finish(figure, panels, None, path)


def finish(figure: Figure, panels: Any, title: str | None, path: Path) -> None:
    """Style panels of shares over steps, add one legend, and write the figure."""
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter("{x:.0%}")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("study"), help="folder of the runs")
    parser.add_argument("--figures", type=Path, default=HERE.parent / "docs" / "study", help="folder of the figures")
    parser.add_argument("--table", choices=TABLES, help="print this table alone, train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    asked = parser.parse_args()
    if asked.table is None:
        with ThreadPoolExecutor(asked.jobs) as pool:
            # Long runs first, so no core idles at the end.
            jobs = [
                pool.submit(train, asked.runs, name, options, seed)
                for name, options in CONDITIONS.items()
                for seed in seeds_of(name)
            ]
            try:
                for job in jobs:
                    job.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # a failed run ends the study
    runs = Runs(asked.runs)
    for name in [asked.table] if asked.table else TABLES:
        print(f"\n{TABLES[name].__doc__}\n\n{TABLES[name](runs)}")
    if asked.table is None:
        draw_styles(runs, asked.figures / "styles.png")
        draw_length(runs, asked.figures / "length.png")


if __name__ == "__main__":
    main()
