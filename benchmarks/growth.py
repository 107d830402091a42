"""How the cost of a training step grows with completions per prompt, new tokens, prompts, and numbers in a puzzle.

    python benchmarks/growth.py --out growth.json

Varies one quantity at a time, from a step of 4 prompts x 16 completions of 160 tokens. Completions have a fixed length,
so costs are comparable; only with more numbers do they end by themselves, because that changes the completions. Every
case runs in its own process, for its own peak memory. Medians over the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from measured import table, write
from rich.console import Console
from rich.progress import Progress
from step import Summary, Work, measure, summarize

from grpo_cli.core.model.load import BUILTIN, detect_precision

PHASES = ("prefill", "decode", "reference", "update", "total")
SWEEPS = {
    "completions": (8, 16, 32, 64),
    "tokens": (64, 128, 256, 512, 1024),
    "prompts": (1, 2, 4, 8, 16),
    "numbers": (3, 4, 5, 6),
}
TITLES = {
    "completions": "completions of each prompt, G",
    "tokens": "new tokens, T",
    "prompts": "prompts, P",
    "numbers": "numbers in a puzzle, n; completions end by themselves, at most 360 tokens",
}


def cases(base: Work) -> Iterator[tuple[str, int, Work]]:
    """Each quantity with each of its values, and the step to time."""
    for name, values in SWEEPS.items():
        for value in values:
            natural = {"ends": "natural", "tokens": 360} if name == "numbers" else {}
            yield name, value, replace(base, **natural, **{name: value})  # type: ignore[arg-type]


def cells(value: int, work: Work, found: Summary) -> list[str]:
    times = [f"{found.seconds[phase]:.2f}" for phase in PHASES]
    new = found.mean_length * work.prompts * work.completions
    per_thousand = f"{1000 * found.seconds['total'] / new:.3f}"
    return [str(value), *times, per_thousand, f"{found.tokens_per_second:,.0f}", f"{found.peak / 2**30:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds that are timed, after one that is not")
    parser.add_argument("--only", choices=SWEEPS, action="append", help="quantities to grow; all by default")
    parser.add_argument("--up-to", type=int, help="leave out values above this one")
    parser.add_argument("--precision", choices=("float32", "bf16-master"), help="the fastest by default")
    parser.add_argument("--model", default=str(BUILTIN), help="model folder")
    parser.add_argument("--out", type=Path, help="write every round as JSON")
    asked = parser.parse_args()

    precision = asked.precision or detect_precision("auto", torch.device("cpu"))
    base = Work(asked.model, precision, 4, 16, 160, ends="none", whole=True, rounds=asked.rounds)
    chosen = [
        (name, value, work)
        for name, value, work in cases(base)
        if name in (asked.only or SWEEPS) and value <= (asked.up_to or value)
    ]
    rows: dict[str, list[list[str]]] = {}
    results = []
    with Progress(console=Console(stderr=True)) as progress:
        for name, value, work in progress.track(chosen, description="cases"):
            rounds = measure(work, ["countdown"])["countdown"]
            found = summarize(rounds, work.prompts * work.completions)
            rows.setdefault(name, []).append([*cells(value, work, found), f"{found.mean_length:.0f}"])
            case = {"grown": name, "value": value, "work": asdict(work), "medians": asdict(found)}
            results.append({**case, "rounds": [asdict(one) for one in rounds]})
    head = ["", *PHASES, "s per 1,000 new tokens", "tokens/s of rollout", "peak memory, GB", "mean length"]
    for name, grown in rows.items():
        print(f"\n{TITLES[name]}\n\n{table(head, grown)}")
    write(asked.out, results)


if __name__ == "__main__":
    main()
