"""Your own tasks and rewards: a Python file with a few functions, or a data set of reasoning-gym by name.

A task file defines

    problems(split) -> list           JSON values, the same on every call; split is "train" or "val"
    prompt(problem) -> str or list    the question, or chat messages
    score(completion, problem) -> float or dict    1.0 is solved; the parts of a dict are summed, and each is logged
    solution(problem) -> str          optional: a completion that scores 1.0

A reward file defines a function of (completion, problem) with the same results. What the files change in this process
is restored (see `guest`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task import gym
from grpo_cli.core.task.guest import apart, call, interrupts
from grpo_cli.core.task.task import Message, Problem, Score, Side, Split, Task, divided

Function = Callable[..., Any]
OnError = Literal["stop", "skip"]
PARAMETERS = {"problems": "split", "prompt": "problem", "score": "completion, problem", "solution": "problem"}
BATCHED = {"prompts", "completions"}  # parameters of rewards for other trainers, which take a batch
LARGEST = 1e15  # of a reward: its square, which the standard deviation needs, is finite in float32
HOSTILE = "<answer>" * 1_000 + "(" * 5_000 + "\x00\ud800" + "</answer>" * 1_000


@dataclass(frozen=True)
class Item:
    """A problem of a task file: any JSON value, stored as text so that it can be hashed.

    `same` is the text of the first problem with the same prompt.
    """

    text: str
    same: str = field(default="", compare=False)

    @property
    def value(self) -> Any:
        return json.loads(self.text)

    @property
    def key(self) -> str:
        return self.same or self.text

    @property
    def size(self) -> int:
        return 0

    def record(self) -> dict[str, object]:
        return {"problem": self.text}

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
    on_error: OnError = "stop"
    _known: dict[Split, list[Item]] = field(default_factory=dict, repr=False, compare=False)

    def notes(self, sizes: Sequence[int]) -> list[str]:
        return []

    def problems(self, split: Split, size: int) -> list[Item]:
        if not self._known:
            asked: dict[str, str] = {}
            train, dev = divided(self.items("train", asked))
            self._known.update({"train": train, "dev": dev, "val": self.items("val", asked)})
        return [*self._known[split]]

    def items(self, side: Side, asked: dict[str, str]) -> list[Item]:
        """The problems of a side, from the file. `asked` is the first problem with each prompt."""
        values = self._call("problems", side)
        if not isinstance(values, list | tuple) or not values:
            raise CountdownError(f"`problems` of `{self.name}` must return a non-empty list for `{side}`")
        try:
            texts = [json.dumps(value, sort_keys=True, allow_nan=False) for value in values]
        except (TypeError, ValueError, RecursionError) as error:
            raise CountdownError(f"a problem of `{self.name}` is not plain JSON: {error}") from None
        for value, text in zip(values, texts, strict=True):
            if json.loads(text) != value:
                problem = f"a problem of `{self.name}` is not plain JSON: {value!r:.100} is read back as {text:.100}"
                raise CountdownError(problem, "use lists instead of tuples, and texts as keys")
        prompts = [json.dumps(self.prompt(Item(text), "")) for text in texts]
        return [Item(text, asked.setdefault(prompt, text)) for text, prompt in zip(texts, prompts, strict=True)]

    def read(self, record: Mapping[str, object]) -> Item:
        if not isinstance(record.get("problem"), str):
            raise ValueError("has no text in `problem`")
        return Item(str(record["problem"]))

    def prompt(self, problem: Problem, style: str) -> list[Message]:
        asked = self._call("prompt", _item(problem).value)
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise CountdownError(f"`prompt` of `{self.name}` must return a text, or messages with `role` and `content`")
        for message in messages:
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:
                raise CountdownError(
                    f"a prompt of `{self.name}` has half a surrogate pair at character {error.start}: {problem}",
                    'decode its text with `errors="replace"`',
                ) from None
        return messages

    def score(self, completion: str, problem: Problem, *, style: str, truncated: bool = False) -> Score:
        scorer, value = f"`score` of `{self.name}`", _item(problem).value
        try:
            reward, parts = _paid(self.functions["score"], scorer, completion, value)
        except CountdownError:
            if self.on_error == "stop":
                raise
            reward, parts = 0.0, {"failed": 1.0}
        correct = reward >= 1.0
        reason = "correct" if correct else "truncated" if truncated else "wrong_value"
        return Score(reward, correct, reason, lenient=correct, well_formed=reward > 0, parts=parts)

    def solution(self, problem: Problem) -> str | None:
        if "solution" not in self.functions:
            return None
        solved = self._call("solution", _item(problem).value)
        return None if solved is None else str(solved)

    def _call(self, name: str, *arguments: object) -> Any:
        return call(self.functions[name], f"`{name}` of `{self.name}`", *arguments)


def _item(problem: Problem) -> Item:
    assert isinstance(problem, Item)
    return problem


def _is_message(message: object) -> bool:
    texts = isinstance(message, dict) and all(isinstance(text, str) for text in message.values())
    return texts and isinstance(message, dict) and {"role", "content"} == set(message)


def _paid(function: Function, what: str, completion: str, problem: object) -> tuple[float, dict[str, float]]:
    """The reward that a user's function returns, and its parts: a number, or a dict of numbers, which are summed."""

    def numbers(*arguments: object) -> tuple[object, list[float | None], list[str]]:
        result = function(*arguments)
        parts = dict(result) if isinstance(result, Mapping) and result else {"": result}
        return result, [_number(value) for value in parts.values()], [str(name) for name in parts if name != ""]

    result, values, names = call(numbers, what, completion, problem)
    paid = [value for value in values if value is not None]
    if len(paid) < len(values) or not all(abs(value) <= LARGEST for value in (*paid, sum(paid))):
        raise CountdownError(
            f"{what} must return a finite number or a dict of them, not {result!r:.100}",
            f"return one number for one completion, at most {LARGEST:.0e}",
        )
    return sum(paid), dict(zip(names, paid, strict=False))


def _number(value: Any) -> float | None:
    """A number of Python, numpy or torch; None for anything else."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    try:
        number = float(value) if isinstance(value, Real | Decimal) else None
    except (OverflowError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


@cache
def load_task(name: str, on_error: OnError = "stop") -> FileTask:
    """The task of `FILE.py` or `gym:NAME`; raises CountdownError with the problem."""
    if name.startswith("gym:"):
        task = FileTask(name, gym.functions(name.removeprefix("gym:")), on_error=on_error)
        task.problems("train", 0)  # a data set may need settings that it has no defaults for
        return task
    functions = _functions(Path(name))
    for needed, parameters in PARAMETERS.items():
        if needed in functions:
            _require_parameters(functions[needed], needed, name, parameters)
        elif needed != "solution":
            raise CountdownError(
                f"`{name}` defines no function `{needed}`", "a task defines `problems`, `prompt` and `score`"
            )
    task = FileTask(Path(name).name, functions, files={"task": _sha256(name)}, on_error=on_error)
    if {*task.items("train", {})} != {*task.problems("train", 0), *task.problems("dev", 0)}:
        hint = "draw them from a generator with a seed, made inside it: `random.Random(0)`"
        raise CountdownError(f"`problems` of `{task.name}` returns other problems when it is called again", hint)
    if on_error == "stop":
        _try(task)
    return task


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _functions(path: Path) -> dict[str, Function]:
    if path.suffix != ".py" or not path.is_file():
        raise CountdownError(f"no Python file `{path}` in `{Path.cwd()}`", "name an existing file that ends in .py")
    file = path.resolve()
    try:
        with apart():
            return {name: value for name, value in _imported(file).items() if callable(value)}
    except BaseException as error:
        if interrupts(error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"line {line}: " if line else ""
        raise CountdownError(f"`{path}` cannot be run: {where}{type(error).__name__}: {error}") from error


def _imported(file: Path) -> dict[str, Any]:
    """The names of a file, imported as a module with its folder on the import path, so that pools can pickle them."""
    folder = str(file.parent)
    sys.path[:] = [other for other in sys.path if other != folder]
    known = sys.modules.get(file.stem)
    found = known.__spec__ if known else find_spec(file.stem) if file.stem.isidentifier() else None
    is_own = found is None or found.origin == str(file)  # rather than an installed module
    sys.path.insert(0, folder)
    name = file.stem if is_own else f"{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    spec = spec_from_file_location(name, file)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return vars(module)


def _require_parameters(function: Function, name: str, path: str, parameters: str) -> None:
    """Raise CountdownError if a function does not take these parameters."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*parameters.split(", "))
        fits = not BATCHED & signature.parameters.keys() and not inspect.iscoroutinefunction(function)
    except TypeError:
        fits = False
    if not fits:
        kind = "async def" if inspect.iscoroutinefunction(function) else "def"
        raise CountdownError(
            f"`{path}` defines `{kind} {name}({', '.join(signature.parameters)})`, which cannot be called",
            f"define `def {name}({parameters})`" + " for one completion" * ("completion" in parameters),
        )


@dataclass(frozen=True)
class Rewarded:
    """A task with a user's reward function; correctness is still the task's own."""

    task: Task
    function: Function = field(repr=False)
    label: str
    on_error: OnError = "stop"

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
            reward, parts = _paid(self.function, f"`{self.label}`", completion, stated)
        except CountdownError:
            if self.on_error == "stop":
                raise
            return replace(score, reward=0.0, parts={"failed": 1.0})
        return replace(score, reward=reward, parts=parts)


@cache
def load_reward(name: str) -> Function:
    """The function `FILE.py:function`."""
    path, _, function = name.rpartition(":")
    if not path:
        raise CountdownError(f"`{name}` does not name a function", "write `--reward FILE.py:function`")
    functions = _functions(Path(path))
    if function not in functions:
        raise CountdownError(f"`{path}` defines no function `{function}`")
    _require_parameters(functions[function], function, path, "completion, problem")
    return functions[function]


def rewarded(task: Task, name: str, on_error: OnError = "stop") -> Task:
    """A task with the reward of `FILE.py:function`, tested first."""
    wrapped = Rewarded(task, load_reward(name), name, on_error)
    _try(replace(wrapped, on_error="stop"))
    return wrapped


def _try(task: Task) -> None:
    """Score five kinds of completion of a problem."""
    problem = task.problems("train", 3)[0]
    right = task.solution(problem) or "<answer>1</answer>"
    for completion in (right, "<think>\n</think>\n<answer>0</answer>", "", "so " * 50_000, HOSTILE):
        task.score(completion, problem, style=task.styles[0])
