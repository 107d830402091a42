"""One training with several processes on the CPU: are the results the same, and how does it scale?

    python benchmarks/ranks.py same --steps 20 --processes 1 2 4     curves and completions side by side
    python benchmarks/ranks.py scaling --steps 10                    weak scaling from 1 to 2 processes, by phase

Both train the built-in model with one thread per process. Runs and a JSON summary are left in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "score", "reference", "update", "optimizer", "reduce", "wait", "total")
CURVE = ("reward", "loss", "kl", "grad_norm", "completion_length")
DUMP = """
import os, torch
from grpo_cli.core.rl import grpo
plain = torch.nn.utils.clip_grad_norm_
def clip(weights, limit, **given):
    weights = list(weights)
    path = {path!r}
    if int(os.environ.get("RANK", "0")) == 0 and not os.path.exists(path):
        torch.save([weight.grad.clone() for weight in weights], path)
    return plain(weights, limit, **given)
torch.nn.utils.clip_grad_norm_ = clip
from grpo_cli.cli.app import main
main()
"""


def start(out: Path, name: str, processes: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Train under torchrun, or without it for one process; saves the gradient of the first step beside the run."""
    script = out / f"{name}.py"
    gradient = out / f"{name}.pt"
    gradient.unlink(missing_ok=True)
    script.write_text(DUMP.format(path=str(gradient)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), "train", "--overwrite"]
    command += ["--preset", "builtin", "--device", "cpu", "--run", name, "--runs", str(out / "runs"), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environ, cwd=out)


def train(out: Path, name: str, processes: int, arguments: Sequence[str]) -> Path:
    """Train as `start` does, to the end; returns the folder of the run."""
    if start(out, name, processes, arguments).wait():
        sys.exit(f"the training {name} failed")
    return out / "runs" / name


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(out: Path, processes: Sequence[int], arguments: Sequence[str]) -> dict[str, object]:
    """How far the runs with more processes differ from the run with the first number of processes."""
    import torch

    runs = {count: train(out, f"same-{count}", count, arguments) for count in processes}
    base = processes[0]
    curves = {count: rows(run / "metrics.jsonl")[1:] for count, run in runs.items()}
    samples = {count: rows(run / "samples.jsonl") for count, run in runs.items()}
    gradients = {count: torch.load(out / f"same-{count}.pt") for count in processes}
    found: dict[str, object] = {}
    for count in processes[1:]:
        pairs = list(zip(gradients[base], gradients[count], strict=True))
        differing = [mine["step"] for mine, other in zip(samples[base], samples[count], strict=True) if mine != other]
        found[f"{base} against {count}"] = {
            "gradient, largest difference": max(float((one - other).abs().max()) for one, other in pairs),
            "gradient, largest": max(float(one.abs().max()) for one, _ in pairs),
            "completions shown": len(samples[base]),
            "completions that differ": len(differing),
            "first step that differs": min(differing, default=None),
        }
    print(f"\n{'step':>4}  " + "".join(f"{f'{name} ({count})':>26}" for name in CURVE[:2] for count in processes))
    for index in range(len(curves[base])):
        values = "".join(f"{curves[count][index][name]:>26.9f}" for name in CURVE[:2] for count in processes)
        print(f"{index + 1:>4}  {values}")
    found["curves"] = {
        name: {str(count): [line[name] for line in lines] for count, lines in curves.items()} for name in CURVE
    }
    return found


def scaling(out: Path, batch_size: int, arguments: Sequence[str]) -> dict[str, object]:
    """Milliseconds per token by phase: one process; two that share twice the prompts; two independent ones.

    The last show the machine's limit. Efficiency is half of the ratio. The learning rate is too small to move a weight,
    so all runs sample from one distribution.
    """
    arguments = [*arguments, "--learning-rate", "1e-12", "--batch-size"]
    one = _milliseconds([train(out, "scaling-1", 1, [*arguments, str(batch_size)])])
    together = _milliseconds([train(out, "scaling-2", 2, [*arguments, str(2 * batch_size)])])
    each = [start(out, f"scaling-{seed}", 1, [*arguments, str(batch_size), "--seed", seed]) for seed in "34"]
    if sum(process.wait() for process in each):
        sys.exit("a training failed")
    apart = _milliseconds([out / "runs" / f"scaling-{seed}" for seed in "34"])
    print("\nms a token    1 process  2 processes   efficiency      2 apart   efficiency")
    found: dict[str, object] = {}
    for name in PHASES:
        both = together[name], apart[name]
        shares = [f"{one[name] / two / 2:.1%}" if one[name] and two else "-" for two in both]
        print(f"{name:>10} {one[name]:>12.4f} {both[0]:>12.4f} {shares[0]:>12} {both[1]:>12.4f} {shares[1]:>12}")
        found[name] = {"1": one[name], "2": both[0], "2 apart": both[1], "efficiency": shares}
    return found


def _milliseconds(runs: Sequence[Path]) -> dict[str, float]:
    """Milliseconds per token of each phase, over simultaneous runs, after a warm-up."""
    lines = [rows(run / "metrics.jsonl")[2:] for run in runs]
    tokens = sum(line["tokens_per_second"] * line["time/total"] for run in lines for line in run)
    seconds = {name: sum(line.get(f"time/{name}", 0.0) for run in lines for line in run) for name in PHASES}
    return {name: 1000 * value / len(runs) / tokens for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["same", "scaling"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=12, help="prompts per step; in scaling, per process")
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--out", type=Path, default=Path("ranks-benchmark"))
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["--num-iterations", given.steps, "--eval-every", given.steps, "--save-every", given.steps]
    arguments += ["--eval-puzzles", 16, "--num-generations", given.num_generations, "--precision", given.precision]
    arguments = [*map(str, arguments), "--max-new-tokens", str(given.max_new_tokens)]
    if given.what == "same":
        found = same(out, given.processes, [*arguments, "--batch-size", str(given.batch_size)])
    else:
        found = scaling(out, given.batch_size, arguments)
    (out / f"{given.what}.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({key: value for key, value in found.items() if key != "curves"}, indent=1))


if __name__ == "__main__":
    main()
