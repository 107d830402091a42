"""Checks of a task before training: is it deterministic, and does only a solution earn a reward?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

from grpo_cli.core.task.task import Task

PROBLEMS = 20
LOW = 0.5  # upper limit for the reward of text without an answer
SLOW = 0.01  # seconds per score
SPAM = "<think></think>" * 50 + "<answer></answer>" * 50


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and the result."""

    name: str
    passed: bool
    result: str


def audit(task: Task, size: int) -> list[Check]:
    """Score solutions and non-solutions of a few train problems."""
    problems, style = list(islice(task.problems("train", size), PROBLEMS)), task.styles[0]
    val = {problem.key for problem in task.problems("val", size)}
    side = [*task.problems("train", size), *task.problems("dev", size)]
    shared = sum(problem.key in val for problem in side)
    checks = [Check("val problems are not in train", not shared, f"{shared:,} shared")]
    asked = [task.prompt(problem, style)[-1]["content"] for problem in problems]
    solutions = [task.solution(problem) for problem in problems]
    known = [(problem, solved) for problem, solved in zip(problems, solutions, strict=True) if solved is not None]
    rewards = [task.score(solved, problem, style=style).reward for problem, solved in known]
    full = sum(task.score(solved, problem, style=style).correct for problem, solved in known)
    checks.append(Check("solutions score full", full == len(known), f"{full} of {len(known)} known solutions"))
    checks.append(
        Check("same score at every call", rewards == [task.score(s, p, style=style).reward for p, s in known], "")
    )
    texts = {"an empty completion": [""] * len(asked), "the question itself": asked, "tags alone": [SPAM] * len(asked)}
    if known:
        texts["the solution of another problem"] = [known[0][1]] * len(asked)
    start = time.perf_counter()
    for name, completions in texts.items():
        pairs = list(zip(completions, problems, strict=True))[name.startswith("the solution") :]
        mean = sum(task.score(text, problem, style=style).reward for text, problem in pairs) / max(1, len(pairs))
        checks.append(Check(f"{name} scores below {LOW}", mean < LOW, f"{mean:.2f} on average"))
    each = (time.perf_counter() - start) / (len(texts) * len(problems))
    checks.append(Check(f"a score takes below {SLOW * 1000:.0f} ms", each < SLOW, f"{each * 1000:.2f} ms"))
    return checks
