"""Data sets of reasoning-gym as tasks: 1,000 train and 200 val problems, scored by the data set's own scorer."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from grpo_cli.core.errors import CountdownError

GYM_SIZE = {"train": 1_000, "val": 200}
TAGS = "Think inside <think> </think>, then write the answer inside <answer> </answer>."
NONSENSE = "?"
# A process of its own: some data sets draw from the global generators, or depend on the order of a set of strings.
MAKE = """
import pickle, random, sys, numpy, reasoning_gym
out, sys.stdout = sys.stdout.buffer, sys.stderr
name, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
numpy.random.seed(seed)
data = reasoning_gym.create_dataset(name, size=size, seed=seed)
pickle.dump([dict(data[index]) for index in range(len(data))], out)
"""
CONSOLATION = 0.05  # at most, what some scorers pay for any answer


def functions(name: str) -> dict[str, Callable[..., Any]]:
    """The functions of a task file for a data set."""
    data = DataSet(name)
    return {"problems": data.problems, "prompt": data.prompt, "score": data.score, "solution": data.solution}


class DataSet:
    """A data set of reasoning-gym. Entry i uses seed + i, so the splits' seeds are far apart."""

    def __init__(self, name: str) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            hint = 'install it with `pip install "countdown-grpo[gym]"`'
            raise CountdownError("reasoning-gym is not installed", hint) from error
        known = sorted(reasoning_gym.factory.DATASETS)
        if name not in known:
            raise CountdownError(f"reasoning-gym has no data set `{name}`", f"it has {', '.join(known[:8])}, ...")
        self.name, self._made = name, dict[str, tuple[Any, list[dict[str, Any]]]]()

    def _data(self, split: str) -> tuple[Any, list[dict[str, Any]]]:
        """The data set of a split, which scores, and its entries, made in a process of their own."""
        if split in self._made:
            return self._made[split]
        import reasoning_gym

        size, seed = GYM_SIZE[split], 0 if split == "train" else 1_000_000
        try:
            made = reasoning_gym.create_dataset(self.name, size=size, seed=seed)
        except Exception as error:
            hint = "choose another data set, or write a task file that makes this one"
            raise CountdownError(f"reasoning-gym has no default settings for `{self.name}`: {error}", hint) from error
        arguments = [sys.executable, "-c", MAKE, self.name, str(size), str(seed)]
        done = subprocess.run(["env", "PYTHONHASHSEED=0", *arguments], capture_output=True)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise CountdownError(f"reasoning-gym failed to make `{self.name}`: {reason}", "choose another data set")
        self._made[split] = made, pickle.loads(done.stdout)
        return self._made[split]

    def problems(self, split: str) -> list[dict[str, Any]]:
        """The problems of a split; none that is trained on is in another."""
        trained = {entry["question"] for entry in self._data("train")[1]} if split != "train" else set()
        return [
            {"split": split, "entry": index, "question": entry["question"], "answer": entry["answer"]}
            for index, entry in enumerate(self._data(split)[1])
            if entry["question"] not in trained
        ]

    def prompt(self, problem: dict[str, Any]) -> str:
        return f"{problem['question']}\n{TAGS}"

    def _earned(self, answer: str, problem: dict[str, Any]) -> float:
        """The data set's own score; 0 if its scorer fails, as some do for an answer that they cannot parse."""
        made, entries = self._data(problem["split"])
        try:
            score = float(made.score_answer(answer, entries[problem["entry"]]))
        except Exception:
            return 0.0
        return score if math.isfinite(score) else 0.0

    def score(self, completion: str, problem: dict[str, Any]) -> float:
        """1.0 for the data set's own solution; another answer earns its score if nonsense earns less."""
        answer = completion.rpartition("</answer>")[0].rpartition("<answer>")[2].strip()
        if "<answer>" not in completion:
            return 0.0
        if problem["answer"] is not None and answer == str(problem["answer"]).strip():
            return 1.0
        paid = self._earned(answer, problem)
        return paid if paid > max(CONSOLATION, self._earned(NONSENSE, problem)) else 0.0

    def solution(self, problem: dict[str, Any]) -> str | None:
        answer = problem["answer"]
        return None if answer is None else f"<think>\n</think>\n<answer>{answer}</answer>"
