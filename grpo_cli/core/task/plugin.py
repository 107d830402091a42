"""Your own tasks and rewards: a Python file with a few functions, or a data set of reasoning-gym by name.

A task file defines

    problems(split) -> list           JSON values, the same on every call; split is "train" or "val"
    prompt(problem) -> str or list    the question, or chat messages
    score(completion, problem) -> float or dict    1.0 is solved; the parts of a dict are summed, and each is logged
    solution(problem) -> str          optional: a completion that scores 1.0

A reward file defines a function of (completion, problem) with the same results. The files are run as ordinary Python.
"""

from __future__ import annotations

import hashlib
import json
import math
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.task import Message, Problem, Score, Side, Split, Task, divided

Function = Callable[..., Any]
GYM_SIZE = {"train": 1_000, "val": 200}
TAGS = "Think inside <think> </think>, then write the answer inside <answer> </answer>."
HOSTILE = "<answer>" * 1_000 + "(" * 5_000 + "\x00\ud800" + "</answer>" * 1_000


@dataclass(frozen=True)
class Item:
    """A problem of a task file: any JSON value, stored as text so that it can be hashed."""

    text: str

    @property
    def value(self) -> Any:
        return json.loads(self.text)

    @property
    def key(self) -> str:
        return self.text

    @property
    def size(self) -> int:
        return 0

    def record(self) -> dict[str, object]:
        return {"problem": self.text}

    @property
    def unasked(self) -> dict[str, object]:
        return self.record()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class FileTask:
    """The task defined by a file's functions."""

    name: str
    functions: Mapping[str, Function] = field(repr=False)
    styles: Sequence[str] = ("zero-shot",)
    cheats: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def notes(self, sizes: Sequence[int]) -> list[str]:
        return []

    def problems(self, split: Split, size: int) -> list[Item]:
        if split == "val":
            return self._items("val")
        train, dev = divided(self._items("train"))
        return dev if split == "dev" else train

    def _items(self, side: Side) -> list[Item]:
        values = self._call("problems", side)
        if not isinstance(values, list | tuple) or not values:
            raise CountdownError(f"`problems` of `{self.name}` must return a non-empty list for `{side}`")
        try:
            return [Item(json.dumps(value, sort_keys=True)) for value in values]
        except (TypeError, ValueError) as error:
            raise CountdownError(f"a problem of `{self.name}` is not plain JSON: {error}") from None

    def read(self, record: Mapping[str, object]) -> Item:
        if not isinstance(record.get("problem"), str):
            raise ValueError("has no text in `problem`")
        return Item(str(record["problem"]))

    def prompt(self, problem: Problem, style: str) -> list[Message]:
        asked = self._call("prompt", _item(problem).value)
        if isinstance(asked, str):
            return [{"role": "user", "content": asked}]
        if not isinstance(asked, list) or not all(
            isinstance(message, dict) and {"role", "content"} == set(message) for message in asked
        ):
            raise CountdownError(f"`prompt` of `{self.name}` must return a text, or messages with `role` and `content`")
        return asked

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        return _score(self._call("score", completion, _item(problem).value), self.name, truncated=truncated)

    def solution(self, problem: Problem) -> str | None:
        if "solution" not in self.functions:
            return None
        solved = self._call("solution", _item(problem).value)
        return None if solved is None else str(solved)

    def kinds(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def _call(self, name: str, *arguments: object) -> Any:
        return call(self.functions[name], f"`{name}` of `{self.name}`", *arguments)


def _item(problem: Problem) -> Item:
    assert isinstance(problem, Item)
    return problem


def call(function: Function, what: str, *arguments: object) -> Any:
    """Call a user's function; an exception becomes a CountdownError with file, line and arguments."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        if _interrupted(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        shown = ", ".join(repr(argument)[:200] for argument in arguments)
        raise CountdownError(
            f"{what} failed in `{place.filename}`, line {place.lineno}: {type(error).__name__}: {error}",
            f"it was called with {shown}",
        ) from error


def _interrupted(error: BaseException) -> bool:
    """Whether this is Ctrl-C rather than the user's own `sys.exit`."""
    return isinstance(error, SystemExit) and error.code == 130


def _finite(value: object) -> bool:
    """Whether this is a number that fits in a float."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _score(result: object, name: str, *, truncated: bool) -> Score:
    """A score from a number, or from a dict of named numbers, which are summed."""
    parts = dict(result) if isinstance(result, Mapping) else {}
    numbers = list(parts.values()) if parts else [result]
    if not all(map(_finite, numbers)):
        raise CountdownError(f"`{name}` must return a finite number or a dict of them, not {result!r:.100}")
    reward = float(sum(numbers))  # type: ignore[arg-type]
    correct = reward >= 1.0
    reason = "correct" if correct else "truncated" if truncated else "wrong_value"
    return Score(
        reward, correct, reason, lenient=correct, well_formed=reward > 0, parts={str(key): parts[key] for key in parts}
    )


@cache
def load_task(name: str) -> Task:
    """The task of `FILE.py` or `gym:NAME`; raises CountdownError with the problem."""
    if name.startswith("gym:"):
        return _gym_task(name.removeprefix("gym:"))
    functions = _functions(Path(name))
    for needed in ("problems", "prompt", "score"):
        if not callable(functions.get(needed)):
            raise CountdownError(
                f"`{name}` defines no function `{needed}`", "a task defines `problems`, `prompt` and `score`"
            )
    return FileTask(Path(name).name, functions, files={"task": _sha256(name)})


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _functions(path: Path) -> dict[str, Function]:
    if path.suffix != ".py" or not path.is_file():
        raise CountdownError(f"no Python file `{path}` in `{Path.cwd()}`", "name an existing file that ends in .py")
    try:
        return {name: value for name, value in runpy.run_path(str(path)).items() if callable(value)}
    except (Exception, SystemExit) as error:
        if _interrupted(error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"line {line}: " if line else ""
        raise CountdownError(f"`{path}` cannot be run: {where}{type(error).__name__}: {error}") from error


def _gym_task(name: str) -> FileTask:
    """A data set of reasoning-gym. Entry i uses seed + i, so the splits' seeds are far apart."""
    try:
        import reasoning_gym
    except ImportError as error:
        hint = 'install it with `pip install "countdown-grpo[gym]"`'
        raise CountdownError("reasoning-gym is not installed", hint) from error
    known = sorted(reasoning_gym.factory.DATASETS)
    if name not in known:
        raise CountdownError(f"reasoning-gym has no data set `{name}`", f"it has {', '.join(known[:8])}, ...")
    scorer = reasoning_gym.create_dataset(name, size=1, seed=0)

    def entries(split: str) -> list[dict[str, Any]]:
        drawn = reasoning_gym.create_dataset(name, size=GYM_SIZE[split], seed=0 if split == "train" else 1_000_000)
        return [json.loads(json.dumps(dict(entry), default=str)) for entry in drawn]

    def problems(split: str) -> list[dict[str, Any]]:
        trained = {entry["question"] for entry in entries("train")} if split != "train" else set()
        return [entry for entry in entries(split) if entry["question"] not in trained]

    def prompt(problem: dict[str, Any]) -> str:
        return f"{problem['question']}\n{TAGS}"

    def score(completion: str, problem: dict[str, Any]) -> float:
        answer = completion.rpartition("</answer>")[0].rpartition("<answer>")[2].strip()
        return float(scorer.score_answer(answer, problem)) if "<answer>" in completion else 0.0

    def solution(problem: dict[str, Any]) -> str:
        return f"<think>\n</think>\n<answer>{problem['answer']}</answer>"

    functions: dict[str, Function] = {"problems": problems, "prompt": prompt, "score": score, "solution": solution}
    return FileTask(f"gym:{name}", functions)


@dataclass(frozen=True)
class Rewarded:
    """A task with a user's reward function; correctness is still the task's own."""

    task: Task
    function: Function = field(repr=False)
    label: str
    on_error: Literal["stop", "skip"] = "stop"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    @property
    def files(self) -> dict[str, str]:
        return {**self.task.files, "reward": _sha256(self.label.rpartition(":")[0])}

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        """The task's score with the function's reward; a failing function ends the run, or gives 0 with `skip`."""
        score = self.task.score(completion, problem, style=style, truncated=truncated)
        stated = problem.value if isinstance(problem, Item) else problem
        try:
            given = _score(call(self.function, f"`{self.label}`", completion, stated), self.label, truncated=truncated)
        except CountdownError:
            if self.on_error == "stop":
                raise
            return replace(score, reward=0.0, parts={"failed": 1.0})
        return replace(score, reward=given.reward, parts=given.parts)


@cache
def load_reward(name: str) -> Function:
    """The function `FILE.py:function`."""
    path, _, function = name.rpartition(":")
    if not path:
        raise CountdownError(f"`{name}` does not name a function", "write `--reward FILE.py:function`")
    functions = _functions(Path(path))
    if function not in functions:
        raise CountdownError(f"`{path}` defines no function `{function}`")
    return functions[function]


def rewarded(task: Task, name: str, on_error: Literal["stop", "skip"] = "stop") -> Task:
    """A task with the reward of `FILE.py:function`, tested first on five kinds of completion."""
    wrapped = Rewarded(task, load_reward(name), name, on_error)
    strict = replace(wrapped, on_error="stop")
    problem = task.problems("train", 3)[0]
    right = task.solution(problem) or "<answer>1</answer>"
    for completion in (right, "<think>\n</think>\n<answer>0</answer>", "", "so " * 50_000, HOSTILE):
        strict.score(completion, problem, style=task.styles[0])
    return wrapped
