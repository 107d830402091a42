"""Countdown behind the interface that training and evaluation know."""

import hashlib

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.files import SPLITS
from grpo_cli.core.task.plugin import Item
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.task import Task, divided, require_apart

TASK: Task = Countdown()


def test_problems_are_the_puzzles_of_a_split() -> None:
    assert [len(TASK.problems(split, 3)) for split in SPLITS] == [2179 - 128, 128, 327]
    assert {problem.size for problem in TASK.problems("val", 4)} == {4}
    require_apart({split: TASK.problems(split, 3) for split in SPLITS})


def test_dev_is_chosen_by_a_hash_of_the_problem() -> None:
    """Neither the order of the problems nor of their numbers matters, and equal problems stay together."""
    puzzles = [Puzzle((1, 2, number), target) for number in range(1, 11) for target in range(1, 11)]
    train, dev = divided(puzzles)
    hashes = sorted(hashlib.sha256(puzzle.key.encode()).hexdigest() for puzzle in puzzles)
    assert sorted(hashlib.sha256(puzzle.key.encode()).hexdigest() for puzzle in dev) == hashes[:10]
    assert set(train) | set(dev) == set(puzzles) and len(train) == 90
    turned = [Puzzle(puzzle.numbers[::-1], puzzle.target) for puzzle in puzzles[::-1]]
    assert {puzzle.key for puzzle in divided(turned + turned)[1]} == {puzzle.key for puzzle in dev}


@pytest.mark.parametrize(("count", "dev"), [(1, 0), (2, 1), (19, 1), (20, 2), (1_279, 127), (1_280, 128), (3_000, 128)])
def test_dev_is_a_tenth_of_train_up_to_a_limit(count: int, dev: int) -> None:
    parts = divided([Item(str(number)) for number in range(count)])
    assert [len(part) for part in parts] == [count - dev, dev]


def test_splits_must_be_apart() -> None:
    apart = {"train": [Item("1"), Item("2")], "dev": [Item("3")], "val": [Item("4")]}
    require_apart(apart)
    with pytest.raises(CountdownError, match="there are no dev problems"):
        require_apart({**apart, "dev": []})
    with pytest.raises(CountdownError, match=r"1 of 2 val problems are also dev problems, first `3`"):
        require_apart({**apart, "val": [Item("3"), Item("5")]})


def test_the_reference_solution_scores_full_and_echoes_do_not() -> None:
    for problem in TASK.problems("val", 3):
        solution = TASK.solution(problem)
        assert solution is not None
        for style in TASK.styles:
            assert TASK.score(solution, problem, style=style).reward == 1.0
        asked = TASK.prompt(problem, "one-shot")
        assert not TASK.score("\n".join(message["content"] for message in asked), problem, style="one-shot").correct


def test_a_problem_comes_back_from_its_record() -> None:
    puzzle = Puzzle((5, 3, 2), 13)
    assert TASK.read({**puzzle.record(), "step": 1}) == puzzle
    assert puzzle.key == Puzzle((2, 3, 5), 13).key != Puzzle((2, 3, 5), 14).key
    for record in ({}, {"numbers": [1, "2"], "target": 3}, {"numbers": [1, 2], "target": None}, {"numbers": 3}):
        with pytest.raises(ValueError, match="has no puzzle"):
            TASK.read(record)
