"""Tasks and rewards of one's own: files that work, and one sentence for each that does not."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import Command

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.audit import audit
from grpo_cli.core.task.countdown import Countdown, task_of
from grpo_cli.core.task.plugin import load_task, rewarded
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.task import require_apart

EXAMPLE = Path(__file__).parent.parent / "examples" / "sort_digits.py"
P13 = Puzzle((3, 5, 2), 13)
RIGHT = "<think></think><answer>5 * 2 + 3</answer>"


def written(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    load_task.cache_clear()
    return str(path)


def failed(task_name: str) -> list[str]:
    return [check.name for check in audit(load_task(task_name), 0) if not check.passed]


def test_the_example_is_a_sound_task() -> None:
    task = load_task(str(EXAMPLE))
    assert failed(str(EXAMPLE)) == []
    problem = task.problems("train", 3)[0]
    solved = task.solution(problem)
    assert solved is not None
    score = task.score(solved, problem, style="zero-shot")
    assert (score.reward, score.correct, score.parts) == (1.0, True, {"format": 0.1, "digits": 0.9})
    assert task.read(problem.record()) == problem
    assert task.prompt(problem, "zero-shot")[0]["role"] == "user"


def test_the_example_is_trained_and_evaluated(countdown: Command, tmp_path: Path) -> None:
    steps = ["--num-iterations", 2, "--batch-size", 2, "--num-generations", 4, "--max-new-tokens", 60]
    done = countdown("train", "--task", EXAMPLE, "--run", "sort", *steps, "--eval-every", 2, "--eval-puzzles", 2)
    assert done.code == 0, done.err
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "sort" / "metrics.jsonl").read_text().splitlines()]
    assert [line["weights_changed"] > 0.9 for line in metrics if line["step"]] == [True] * 2
    assert any(line["reward/format"] > 0 for line in metrics[1:])
    asked = countdown("eval", "sort", "--task", EXAMPLE, "--split", "train", "--max-new-tokens", 4, "--json")
    result = json.loads(asked.out)
    assert result["overlap"] == 4 and result["files"] == {"task": hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()}
    assert "was trained on" in asked.err
    solved = countdown("solve", "4 7 3 = 25", "--model", "sort", "--max-new-tokens", 8)
    assert solved.code == 1 and "running" not in solved.err and "one solution" not in solved.err


def test_countdown_is_a_sound_task() -> None:
    assert [check.name for check in audit(Countdown(), 3) if not check.passed] == []


def test_an_audit_finds_what_pays_without_an_answer(tmp_path: Path) -> None:
    name = written(
        tmp_path,
        "def problems(split): return [[split, i] for i in range(30)]\n"
        "def prompt(x): return str(x)\ndef score(text, x): return 1.0\n",
    )
    assert failed(name) == [
        "an empty completion scores below 0.5",
        "the question itself scores below 0.5",
        "tags alone scores below 0.5",
    ]
    name = written(
        tmp_path,
        "def problems(split): return [1, 2]\ndef prompt(x): return 'say'\ndef score(text, x): return 0.0\n"
        "def solution(x): return 'a'\n",
    )
    assert failed(name) == ["val problems are not in train", "solutions score full"]


GOOD = "def problems(split): return [1]\ndef prompt(x): return 'q'\ndef score(text, x): return 0.5\n"
RANDOM = "import random\n" + GOOD.replace("[1]", "[random.random() for _ in range(30)]")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no function `problems`"),
        ("x = 1 +\n", "mine.py` cannot be run: line 1: SyntaxError"),
        ("x = 1\ny = x / 0\n", "mine.py` cannot be run: line 2: ZeroDivisionError: division by zero"),
        (GOOD.replace("[1]", "[]"), "`problems` of `mine.py` must return a non-empty list for `train`"),
        (GOOD.replace("[1]", "[{1}]"), "a problem of `mine.py` is not plain JSON"),
        (GOOD.replace("[1]", "[(1, 2)]"), "not plain JSON: (1, 2) is read back as [1, 2]"),
        (GOOD.replace("[1]", "[{1: 2}]"), "is not plain JSON: {1: 2} is read back as {"),
        (GOOD.replace("[1]", "[float('nan')]"), "is not plain JSON"),
        (RANDOM, "`problems` of `mine.py` returns other problems when it is called again"),
        (RANDOM.replace("import random", "import random; random.seed(0)"), "returns other problems"),
        (GOOD.replace("'q'", "5"), "`prompt` of `mine.py` must return a text, or messages"),
        (GOOD.replace("0.5", "'high'"), "`mine.py` must return a finite number or a dict of them, not 'high'"),
        (GOOD.replace("0.5", "float('nan')"), "`mine.py` must return a finite number"),
        (GOOD.replace("0.5", "10**400"), "`mine.py` must return a finite number"),
        (GOOD.replace("0.5", "1 / 0"), "`score` of `mine.py` failed in"),
        (GOOD.replace("0.5", "{'a': 1e308, 'b': 1e308}"), "`score` of `mine.py` must return a finite number"),
        (GOOD.replace("0.5", "1e300"), "must return a finite number or a dict of them, not 1e+300"),
        (GOOD.replace("'q'", "'\\ud800'"), "a prompt of `mine.py` has half a surrogate pair at character 0: 1"),
        (GOOD.replace("'q'", "[]"), "`prompt` of `mine.py` must return a text, or messages"),
        (GOOD.replace("'q'", "[{'role': 'user', 'content': None}]"), "`prompt` of `mine.py` must return a text, or"),
        (GOOD.replace("'q'", "[{'role': 'user', 'content': 'a\\udfff'}]"), "half a surrogate pair at character 1"),
        (GOOD.replace("score(text, x)", "score(x)"), "mine.py` defines `def score(x)`, which cannot be called"),
        (GOOD.replace("problems(split)", "problems()"), "mine.py` defines `def problems()`, which cannot be called"),
        (GOOD.replace("0.5", "exit(0)"), "SystemExit: 0"),
        ("import sys\nsys.exit(0)\n", "mine.py` cannot be run: line 2: SystemExit: 0"),
    ],
)
def test_a_wrong_task_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    name = written(tmp_path, text)
    with pytest.raises(CountdownError, match=re.escape(message)) as caught:
        audit(load_task(name), 0)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["none.py", "mine.txt", "gym:no_such_set"])
def test_a_task_that_is_not_there_is_one_sentence(name: str) -> None:
    if name.startswith("gym"):
        pytest.importorskip("reasoning_gym")
    with pytest.raises(CountdownError, match=r"no Python file|has no data set"):
        load_task(name)


@pytest.mark.parametrize("name", ["countdown", "basic_arithmetic"])
def test_data_sets_of_reasoning_gym_are_tasks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr("grpo_cli.core.task.gym.GYM_SIZE", {"train": 20, "val": 5})
    load_task.cache_clear()
    task = load_task(f"gym:{name}")
    assert [check.name for check in audit(task, 0) if not check.passed] == []
    assert 1 <= len(task.problems("val", 0)) <= 5


def test_a_reward_pays_and_the_strict_score_decides_what_is_correct(tmp_path: Path) -> None:
    name = written(tmp_path, "def mine(text, puzzle): return {'short': -len(text) / 100, 'sum': sum(puzzle.numbers)}\n")
    task = rewarded(Countdown(), f"{name}:mine")
    score = task.score(RIGHT, P13, style="one-shot")
    assert score.correct and score.reason == "correct"
    assert score.parts == {"short": -len(RIGHT) / 100, "sum": 10}
    assert score.reward == pytest.approx(10 - len(RIGHT) / 100)
    assert not task.score("no", P13, style="one-shot").correct
    assert task.problems("val", 3) == Countdown().problems("val", 3) and task.name == "countdown"


def test_a_probe_asks_and_scores_as_the_task_does(countdown: Command, tmp_path: Path) -> None:
    name = written(tmp_path, GOOD.replace("[1]", "[1, 2, 3]").replace("'q'", "str(x)").replace("0.5", "1.0"))
    small = ["--batch-size", 2, "--num-generations", 2, "--max-new-tokens", 4]
    shown = " ".join(countdown("train", "--task", name, "--probe", *small).out.split())
    assert "zero-shot 2 100.0%" in shown and "natural" not in shown


def test_a_file_of_code_is_named_before_it_runs(countdown: Command, tmp_path: Path) -> None:
    name = written(tmp_path, "raise ValueError('still here')\n")
    for option in (["--task", name], ["--reward", f"{name}:mine"]):
        found = countdown("train", *option)
        assert found.code == 2 and found.err.startswith(f"running `{name}`\nerror: `{name}` cannot be run: line 1")


def test_what_a_task_prints_leaves_json_alone(countdown: Command, tmp_path: Path) -> None:
    name = written(tmp_path, "print('loaded')\n" + GOOD.replace("return 0.5", "print('scored'); return 0.5"))
    done = countdown("eval", "--task", name, "--json", "--max-new-tokens", 4)
    assert json.loads(done.out)["count"] == 1
    assert "loaded" in done.err and "scored" in done.err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(text, puzzle): return 1\n", "defines no function `mine`"),
        ("def mine(text): return 1\n", "defines `def mine(text)`, which cannot be called"),
        ("def mine(completions, **columns): return [1]\n", "defines `def mine(completions, columns)`"),
        ("def mine(prompts, completions): return [1]\n", "defines `def mine(prompts, completions)`"),
        ("def mine(data_source, solution_str, ground_truth, extra_info=None): return 1\n", "`def mine(data_source, "),
        ("async def mine(text, puzzle): return 1\n", "defines `async def mine(text, puzzle)`"),
        ("def mine(text, puzzle): return [1.0]\n", "must return a finite number or a dict of them, not [1.0]"),
        ("def mine(text, puzzle): return {'a': 1e308, 'b': 1e308}\n", "must return a finite number"),
        ("def mine(text, puzzle): return {'a': 1e300, 'b': -1e300}\n", "must return a finite number"),
        ("def mine(text, puzzle): return 1e39\n", "must return a finite number"),  # beyond float32
        ("def mine(text, puzzle): return None\n", "must return a finite number or a dict of them, not None"),
        ("def mine(text, puzzle):\n    return 1 / len(text)\n", "mine.py`, line 2: ZeroDivisionError"),
        ("def mine(text, puzzle):\n    return len(text.encode())\n", "line 2: UnicodeEncodeError"),
    ],
)
def test_a_reward_is_tried_before_training(tmp_path: Path, text: str, message: str) -> None:
    name = written(tmp_path, text)
    for on_error in ("stop", "skip"):
        with pytest.raises(CountdownError, match=re.escape(message)):
            rewarded(Countdown(), f"{name}:mine", on_error)


@pytest.mark.parametrize(
    "result",
    [
        "numpy.float32(0.25)", "numpy.array(0.25)", "torch.tensor(0.25)", "Fraction(1, 4)", "Decimal('0.25')",
        "{'a': numpy.int64(1), 'b': torch.tensor(-0.75, requires_grad=True)}", "{'a': numpy.float64(0.25)}",
    ],
)  # fmt: skip
def test_a_number_of_any_library_is_a_reward(tmp_path: Path, result: str) -> None:
    imports = "import numpy, torch\nfrom fractions import Fraction\nfrom decimal import Decimal\n"
    name = written(tmp_path, f"{imports}def mine(text, puzzle): return {result}\n")
    score = rewarded(Countdown(), f"{name}:mine").score(RIGHT, P13, style="one-shot")
    assert score.reward == 0.25 and json.dumps([score.reward, score.parts])


def test_a_function_for_another_trainer_is_met_with_ours(tmp_path: Path) -> None:
    name = written(tmp_path, "def mine(completions, **columns): return [1]\n")
    with pytest.raises(CountdownError) as caught:
        rewarded(Countdown(), f"{name}:mine")
    assert caught.value.hint == "define `def mine(completion, problem)` for one completion"


def test_a_scorer_that_raises_ends_the_run_or_is_skipped_and_counted(tmp_path: Path) -> None:
    name = written(tmp_path, GOOD.replace("return 0.5", "return 1 / (text != 'rare')"))
    problem = load_task(name).problems("train", 0)[0]
    with pytest.raises(CountdownError, match="division by zero"):
        load_task(name).score("rare", problem, style="")
    score = load_task(name, "skip").score("rare", problem, style="")
    assert (score.reward, score.correct, score.parts) == (0.0, False, {"failed": 1.0})


def test_problems_are_made_once_and_checked_once(tmp_path: Path) -> None:
    made = "asked = []\ndef problems(split): asked.append(split); return [split, len(asked) * 0]\n"
    task = load_task(written(tmp_path, made + "def prompt(x): return str(x)\ndef score(text, x): return 0.0\n"))
    assert task.functions["problems"].__globals__["asked"].count("train") == 2
    assert task.problems("train", 3).pop() in task.problems("train", 3)
    assert task.functions["problems"].__globals__["asked"].count("train") == 2


def test_problems_with_the_same_prompt_stay_on_one_side(tmp_path: Path) -> None:
    """Each question is asked five times, with another id."""
    text = "def problems(split): return [[i, i % 20] for i in range(100)] if split == 'train' else [[7, 3], [0, 99]]\n"
    name = written(tmp_path, text + "def prompt(x): return str(x[1])\ndef score(text, x): return 0.0\n")
    task = load_task(name)
    train, dev, val = ({json.loads(item.text)[1] for item in task.problems(s, 0)} for s in ("train", "dev", "val"))
    assert len(dev) == 2 and len(train) == 18 and not train & dev
    with pytest.raises(CountdownError, match="1 of 2 val problems are also"):
        require_apart({split: task.problems(split, 0) for split in ("train", "dev", "val")})
    assert val == {3, 99}


def test_an_exception_ends_the_run_or_is_skipped_and_counted(tmp_path: Path) -> None:
    name = written(tmp_path, "def mine(text, puzzle): return 1 / (text != 'rare')\n")
    with pytest.raises(CountdownError, match="division by zero") as caught:
        rewarded(Countdown(), f"{name}:mine").score("rare", P13, style="one-shot")
    assert "it was called with 'rare'" in str(caught.value.hint)
    skipped = rewarded(Countdown(), f"{name}:mine", "skip").score("rare", P13, style="one-shot")
    assert (skipped.reward, skipped.parts) == (0.0, {"failed": 1.0})


def test_settings_choose_the_task_and_the_reward(tmp_path: Path) -> None:
    name = written(tmp_path, "def mine(text, puzzle): return 0.25\n")

    def chosen(**flags: str) -> float:
        given: dict[str, object] = {key.replace("__", "."): value for key, value in flags.items()}
        task = task_of(resolve(flags=given, has_cuda=lambda: False).settings)
        return task.score(RIGHT, P13, style="one-shot").reward

    assert chosen() == 1.0
    assert chosen(reward__reward=f"{name}:mine") == 0.25
    assert chosen(task__operations="+") == 0.2
    assert task_of(resolve(flags={"task.task": str(EXAMPLE)}, has_cuda=lambda: False).settings).name == "sort_digits.py"
