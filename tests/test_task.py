"""Countdown behind the interface that training and evaluation know."""

import pytest

from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.task import Task

TASK: Task = Countdown()


def test_problems_are_the_puzzles_of_a_split() -> None:
    assert [len(TASK.problems(split, 3)) for split in ("train", "val")] == [2179, 327]
    assert {problem.size for problem in TASK.problems("val", 4)} == {4}


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


def test_a_problem_belongs_to_kinds() -> None:
    assert TASK.kinds(Puzzle((2, 3, 5), 25)) == ("needs parentheses", "one solution")
    assert TASK.kinds(Puzzle((2, 3, 5), 13)) == ("no parentheses needed", "several solutions")
