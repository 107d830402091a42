"""Data sets of reasoning-gym as tasks."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task import gym
from grpo_cli.core.task.files import SPLITS
from grpo_cli.core.task.plugin import load_task
from grpo_cli.core.task.task import Problem, require_apart

reasoning_gym = pytest.importorskip("reasoning_gym")
NAMES = sorted(reasoning_gym.factory.DATASETS)
UNSOLVED = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # no solution of their own
NEEDS_SETTINGS = {"composite"}
QUICK = ["arc_agi", "bf", "boxnet", "game_of_life_halting", "list_functions", "prime_factorization", "countdown"]
PARTIAL = {"figlet_font": 0.5}  # a share for each right letter
MALFORMED = ["banana", "((((", "[1,", "x" * 1_000, "1/0", "None"]


pytestmark = pytest.mark.filterwarnings("ignore")  # of the data sets


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "GYM_SIZE", {"train": 20, "val": 5})
    load_task.cache_clear()


def answered(text: str) -> str:
    return f"<think></think><answer>{text}</answer>"


def check(name: str) -> None:
    """Solutions score 1, malformed answers 0, two loads give the same problems, and no split shares a prompt."""
    task = load_task(f"gym:{name}")
    problems: dict[str, Sequence[Problem]] = {split: task.problems(split, 0) for split in SPLITS}
    require_apart(problems)
    asked = {split: {str(task.prompt(problem, "")) for problem in own} for split, own in problems.items()}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())), "a prompt is in two splits"
    load_task.cache_clear()
    again = load_task(f"gym:{name}")
    assert {split: again.problems(split, 0) for split in SPLITS} == problems, "other problems at the second load"
    for problem in again.problems("val", 0)[:3]:
        solved = again.solution(problem)
        assert (solved is None) == (name in UNSOLVED)
        assert solved is None or again.score(solved, problem, style="").reward == 1.0, "the solution scores below 1"
        assert again.score("no tags", problem, style="").reward == 0.0
        own = str(problem.value["answer"]).strip()
        paid = {
            text[:9]: again.score(answered(text), problem, style="").reward for text in MALFORMED if own not in text
        }
        assert max(paid.values()) <= PARTIAL.get(name, 0), f"malformed answers earn {paid}"


@pytest.mark.parametrize("name", QUICK)
def test_a_data_set_is_a_sound_task(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in {*QUICK, *NEEDS_SETTINGS}])
def test_every_data_set_is_a_sound_task(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", sorted(NEEDS_SETTINGS))
def test_a_data_set_without_default_settings_is_refused(name: str) -> None:
    with pytest.raises(CountdownError, match=f"reasoning-gym has no default settings for `{name}`"):
        load_task(f"gym:{name}")


PRINT = """
from grpo_cli.core.task import gym
gym.GYM_SIZE = {"train": 5, "val": 5}
print(gym.functions("polynomial_multiplication")["problems"]("train"))
"""


def test_every_process_makes_the_same_problems() -> None:
    """The questions of this data set follow the order of a set of strings, which depends on the hash seed."""
    made = [
        subprocess.run(["env", f"PYTHONHASHSEED={seed}", sys.executable, "-c", PRINT], capture_output=True, text=True)
        for seed in (1, 2)
    ]
    assert made[0].stdout == made[1].stdout != ""
