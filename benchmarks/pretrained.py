"""What pretrained models gain by warm start and by reinforcement, by preset and seed.

    python benchmarks/pretrained.py smollm2-135m --model SmolLM2-135M-Instruct.Q4_1.gguf --seeds 0 1 2
    python benchmarks/pretrained.py smollm2-135m --table       print the tables of existing results, train nothing

Trains each seed with `countdown train`. Then evaluates the base model once, and each seed's warm-started and best
models, on all val puzzles greedily, and on 64 of them with eight samples, in each style. Every command is printed.
Stopped runs are resumed; results are saved as JSON beside the runs and reused.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from measured import table

from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.ui.figures import COLOURS

DECODINGS = {"greedy": [], "sampled": ["--samples", "8", "--temperature", "0.8", "--limit", "64"]}
PANELS = {
    "accuracy": "sampled accuracy",
    "format_rate": "format",
    "truncated": "cut off",
    "completion_length": "tokens",
}


def countdown(arguments: Sequence[str], **options: Any) -> str:
    """Print and run a command; returns its output."""
    print("countdown", shlex.join(arguments), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "grpo_cli", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def train(runs: Path, name: str, flags: Sequence[str]) -> None:
    """Train a run to its end, resuming it if it exists."""
    if (runs / name / "summary.json").exists():
        return
    resumed = (runs / name / "checkpoints").is_dir()
    countdown(["train", "--runs", str(runs), "--run", name, *(["--resume"] if resumed else flags)])


def evaluate(runs: Path, name: str, models: Sequence[str], style: str, decoding: str, flags: Sequence[str]) -> None:
    """Run `countdown eval` on one style, unless the result is there."""
    path = runs / f"{name}.{style}.{decoding}.json"
    if not path.exists():
        shown = ["--runs", str(runs), "--style", style, "--json"]
        path.write_text(countdown(["eval", *models, *flags, *shown, *DECODINGS[decoding]]))


def rows(runs: Path, name: str, stages: Sequence[str]) -> list[list[str]]:
    """Accuracy of each model in each style, with its 95 % interval; pass@8 for sampled completions."""
    lines = []
    for style, decoding in product(STYLES, DECODINGS):
        path = runs / f"{name}.{style}.{decoding}.json"
        found = json.loads(path.read_text()) if path.exists() else {"models": []}
        for stage, cell in zip(stages, found.get("models", [found]), strict=False):
            low, high = (100 * edge for edge in cell["interval"])
            several = "" if cell["pass_at_k"] is None else f"{cell['pass_at_k']:.1%}"
            shown = [f"{cell['accuracy']:.1%} ({low:.1f} to {high:.1f})", several, f"{cell['format_rate']:.1%}"]
            lines.append([name, stage, style, decoding, str(cell["count"]), *shown, f"{cell['mean_length']:.0f}"])
    return lines


def draw(runs: Path, names: Sequence[str], path: Path) -> None:
    """Training curves, one line per run."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items(), strict=True):
        for colour, name in zip(COLOURS, names, strict=False):
            lines = [line for line in Run.open(runs, name).metrics() if key in line]
            axes.plot([line["step"] for line in lines], [line[key] for line in lines], color=colour, label=name)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="preset of the model, such as smollm2-135m")
    parser.add_argument("--model", help="folder or GGUF file, instead of the preset's hub id")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("pretrained"), help="folder of the runs")
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=STYLES)
    parser.add_argument("--decodings", nargs="+", choices=DECODINGS, default=list(DECODINGS))
    parser.add_argument("--table", action="store_true", help="train and evaluate nothing")
    asked = parser.parse_args()
    names = [f"{asked.preset}-{seed}" for seed in asked.seeds]
    model = ["--model", asked.model] if asked.model else []
    for seed, name in [] if asked.table else zip(asked.seeds, names, strict=True):
        train(asked.runs, name, ["--preset", asked.preset, *model, "--seed", str(seed)])
        settings = json.loads((asked.runs / name / "config.json").read_text())
        tokens = ["--max-new-tokens", str(settings["train"]["max_new_tokens"])]
        for style, decoding in product(asked.styles, asked.decodings):
            evaluate(asked.runs, name, [str(asked.runs / name / "warm_start"), name], style, decoding, tokens)
            evaluate(asked.runs, asked.preset, [settings["model"]["model"]], style, decoding, tokens)
    head = ["run", "stage", "style", "decoding", "puzzles", "accuracy (95 %)", "pass@8", "format", "tokens"]
    lines = rows(asked.runs, asked.preset, ["base"])
    print(table(head, lines + [row for name in names for row in rows(asked.runs, name, ["warm start", "trained"])]))
    draw(asked.runs, names, asked.runs / f"{asked.preset}.png")


if __name__ == "__main__":
    main()
