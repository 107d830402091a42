"""Time of the solver on puzzles of six numbers, with empty caches: one solution, and all of them.

    python benchmarks/solver.py

CPU time per puzzle in milliseconds. `unsolvable` uses a target that no expression of the numbers can make.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from grpo_cli.core.task import solver
from grpo_cli.core.task.data import generate
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import Rules

DIVIDED = Rules("+-*/")
CASES = {
    "+-*, 1 to 10": Rules(),
    "+-*/, 1 to 10": DIVIDED,
    "+-*/, 1 to 10, some numbers left out": replace(DIVIDED, use_all=False),
    "+-*/, 1 to 99, targets 10 to 99": Rules("+-*/", 1, 99, 10, 99),
    "+-*/, 1 to 100, targets 100 to 999": Rules("+-*/", 1, 100, 100, 999),
}
UNREACHABLE = 10**13 + 37  # a target above 100 ** 6


def clear_caches() -> None:
    for value in vars(solver).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def milliseconds(solve: Callable[[Puzzle, Rules], object], puzzle: Puzzle, rules: Rules) -> float:
    clear_caches()
    start = time.thread_time()
    solve(puzzle, rules)
    return 1000 * (time.thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=200, help="puzzles of each case")
    count = parser.parse_args().puzzles
    shown = Table("rules", "search", "median", "95 %", "largest", "most solutions")
    for name, rules in CASES.items():
        puzzles = generate(count, numbers=6, seed=3, rules=rules)
        most = str(max(len(solver.solve(puzzle, rules)) for puzzle in puzzles))
        unsolvable = [replace(puzzle, target=UNREACHABLE) for puzzle in puzzles[: max(1, count // 10)]]
        for search, solve, asked in (
            ("one solution", solver.solution, puzzles),
            ("all solutions", solver.solve, puzzles),
            ("unsolvable", solver.solution, unsolvable),
        ):
            times = sorted(milliseconds(solve, puzzle, rules) for puzzle in asked)
            figures = [f"{times[int(share * (len(times) - 1))]:.1f}" for share in (0.5, 0.95, 1)]
            shown.add_row(name, search, *figures, most if search == "all solutions" else "")
    Console().print(shown)


if __name__ == "__main__":
    main()
