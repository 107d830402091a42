"""Rules other than the original's: the solver beside brute force, prompts, and puzzles within them."""

import random
import time
from dataclasses import replace
from fractions import Fraction

import pytest
from test_puzzle import brute_force

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.data import enumerate_puzzles, generate, is_enumerable, puzzle_set, sampling_note
from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.prompts import STYLES, instruction, prompt, worked_example
from grpo_cli.core.task.puzzle import Puzzle, judge
from grpo_cli.core.task.question import read_question
from grpo_cli.core.task.rules import Rules, operations_in
from grpo_cli.core.task.scoring import score
from grpo_cli.core.task.solver import solution, solve, targets

ALL = Rules("+-*/")
PUBLIC = Rules("+-*/", 1, 99, 10, 99)  # of the public data set of 3 to 4 numbers
GROUPS = ["+", "*", "+-", "+*", "*/", "+-*", "+*/", "+-*/"]


@pytest.mark.parametrize("operations", GROUPS)
@pytest.mark.parametrize("numbers", [(2, 3, 8), (4, 4, 10), (1, 3, 4, 6)])
def test_the_solver_makes_what_brute_force_makes(numbers: tuple[int, ...], operations: str) -> None:
    rules = Rules(operations, max_target=1_000)
    expected = {int(value) for value in brute_force(numbers, operations) if value.denominator == 1}
    assert targets(numbers, rules) == {value for value in expected if 1 <= value <= 1_000}
    for target in random.Random(0).sample(range(1, 200), 40):
        puzzle = Puzzle(numbers, target)
        solutions = solve(puzzle, rules)
        assert bool(solutions) == (target in expected) == (solution(puzzle, rules) is not None)
        assert all(judge(puzzle, parse(text, operations), rules) == "correct" for text in solutions)


def test_solutions_with_division_worked_out_by_hand() -> None:
    assert solve(Puzzle((1, 3, 4, 6), 24), ALL) == ["6 / (1 - 3 / 4)"]
    assert solve(Puzzle((3, 3, 8, 8), 24), ALL) == ["8 / (3 - 8 / 3)"]
    assert solve(Puzzle((2, 8), 4), ALL) == ["8 / 2"]
    assert solve(Puzzle((2, 3, 24), 4), ALL) == ["24 / 2 / 3"]
    assert not solve(Puzzle((1, 3, 4, 6), 24))


def test_numbers_may_be_left_out_where_the_rules_say_so() -> None:
    some = Rules(use_all=False)
    assert solve(Puzzle((2, 3, 50), 6), some) == ["2 * 3"] and not solve(Puzzle((2, 3, 50), 6))
    assert solve(Puzzle((2, 7, 50), 50), some)[0] == "50"
    for answer, reason in [("2 * 3", "correct"), ("2 * 2", "wrong_value"), ("3 + 3", "wrong_numbers")]:
        assert judge(Puzzle((2, 2, 3), 6), parse(answer), some) == reason


@pytest.mark.parametrize("rules", [ALL, replace(ALL, use_all=False), Rules("+-*/", 1, 99, 10, 99)])
def test_six_numbers_with_division_are_solved_at_once(rules: Rules) -> None:
    """Every puzzle takes below 50 ms of CPU time: `benchmarks/solver.py` shows how far below."""
    seconds = []
    for puzzle in generate(20, numbers=6, seed=3, rules=rules):
        start = time.thread_time()
        text = solution(puzzle, rules)
        seconds.append(time.thread_time() - start)
        assert text and judge(puzzle, parse(text, "+-*/"), rules) == "correct"
    assert max(seconds) < 0.05
    assert solution(Puzzle((1, 1, 1, 1, 1, 1), 97), rules) is None


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("8 / 3 * 3", 8), ("8 / (3 - 8 / 3)", 24), ("-6 / -3", 2), ("6 / - (3)", -2), ("1 - 6 / 3 / 2", 0),
        ("2 * (3 + 5) / 4", 4), ("1 / 3", Fraction(1, 3)), ("1 / 0", None), ("5 / (3 - 3)", None), ("0 / 5", 0),
        ("(1 / (2 - 2)) * 0", None),
    ],
)  # fmt: skip
def test_division_is_exact(answer: str, value: Fraction | None) -> None:
    expression = parse(answer, "+-*/")
    assert expression is not None and expression.value == value
    assert parse(answer) is None


@pytest.mark.parametrize("answer", ["8 // 2", "8 / / 2", "8 /", "/ 2", "8 ÷ 2", "8 /* 2", "2 ** 3"])
def test_other_notations_of_division_are_no_expressions(answer: str) -> None:
    assert parse(answer, "+-*/") is None
    assert score(f"<answer>{answer}</answer>", Puzzle((8, 2), 4), rules=ALL).lenient == ("÷" in answer)


def test_signs_belong_to_subtraction() -> None:
    assert parse("5 + -3", "+-") and parse("-5 + 8", "+-*")
    assert parse("5 + -3", "+*") is None and parse("+5 * 2", "*") is None and parse("(-5) * 2", "+*") is None


@pytest.mark.parametrize(("text", "operations"), [("+-*", "+-*"), ("*+", "+*"), ("+, -, *, /", "+-*/"), ("/*", "*/")])
def test_operations_are_read_in_any_order(text: str, operations: str) -> None:
    assert operations_in(text) == operations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "some of"), ("++", "some of"), ("+^", "some of"), ("-*", r"`-` needs `\+`"), ("+/", r"`/` needs `\*`"),
    ],
)  # fmt: skip
def test_other_operations_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operations_in(text)


@pytest.mark.parametrize("operations", GROUPS)
@pytest.mark.parametrize("use_all", [True, False])
def test_prompts_state_the_rules_and_their_example_follows_them(operations: str, use_all: bool) -> None:
    rules = Rules(operations, use_all=use_all)
    example, answer = worked_example(rules)
    assert score(answer, example, rules=rules).correct
    for style in STYLES:
        assert instruction(rules) in prompt(Puzzle((4, 7, 3), 25), style, rules)[-1]["content"]


def test_instructions_in_words() -> None:
    assert instruction() == "Use every number exactly once, with +, - and *."
    assert instruction(ALL) == "Use every number exactly once, with +, -, * and /."
    assert instruction(Rules("*", use_all=False)) == "Use each number at most once, with *."


def test_puzzles_are_enumerated_or_sampled_by_the_rules() -> None:
    small = Rules("+-*/", 2, 5, 10, 30)
    puzzles = list(enumerate_puzzles(3, rules=small))
    assert is_enumerable(3, small) and not is_enumerable(3, PUBLIC)
    assert all(solve(puzzle, small) for puzzle in puzzles)
    assert {number for puzzle in puzzles for number in puzzle.numbers} == {2, 3, 4, 5}
    assert min(puzzle.target for puzzle in puzzles) == 10 and max(puzzle.target for puzzle in puzzles) == 30
    assert sampling_note(3, small) is None
    note = "3 numbers from 1 to 99: too many puzzles to enumerate, each split is a fixed sample of up to 2,000"
    assert sampling_note(3, PUBLIC) == note and Countdown(PUBLIC).notes([3]) == [note] and not Countdown().notes([3])
    sample = puzzle_set(3, "val", PUBLIC)
    assert len({puzzle.canonical for puzzle in sample}) == len(sample) == 2_000
    assert all(puzzle.split == "val" and 10 <= puzzle.target <= 99 for puzzle in sample)


def test_rules_without_puzzles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.task.data.MOST_DRAWS", 100)
    with pytest.raises(CountdownError, match="100 draws in a row made no such puzzle"):
        generate(1, numbers=3, rules=Rules("+", 5, 9, 1, 3))


def test_questions_are_read_within_the_rules() -> None:
    wide = Rules(max_number=500, max_target=5_000)
    assert read_question("400 7 3 = 2800", wide) == Puzzle((400, 7, 3), 2800)
    with pytest.raises(CountdownError, match="between 1 and 500, and 501 does not"):
        read_question("501 7 3 = 25", wide)


@pytest.mark.slow
def test_answers_of_another_generator_score_full_and_ours_score_full_there() -> None:
    gym = pytest.importorskip("reasoning_gym")
    rules = Rules("+-*/", 1, 100, 100, 999)
    instances = gym.create_dataset("countdown", size=500, seed=7)
    for instance in instances:
        facts = instance["metadata"]
        puzzle = Puzzle(tuple(facts["numbers"]), facts["target"])
        assert score(f"<answer>{instance['answer']}</answer>", puzzle, rules=rules).correct
        assert instances.score_answer(solution(puzzle, rules), instance) == 1.0


def test_the_task_follows_its_rules() -> None:
    task = Countdown(ALL)
    puzzle = Puzzle((1, 3, 4, 6), 24)
    completion = task.solution(puzzle)
    assert completion and task.score(completion, puzzle, style="one-shot").correct
    assert not Countdown().score(completion, puzzle, style="one-shot").correct
    assert "with +, -, * and /." in task.prompt(puzzle, "natural")[-1]["content"]


def test_draws_of_rare_targets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.task.data.MOST_TRIES", 30_000)
    rare, started = Rules("+-*/", 1, 10, 900, 1_000), time.process_time()
    few = puzzle_set(6, "train", rare)
    puzzle_set.cache_clear()
    assert 0 < len(few) < 500 and few == puzzle_set(6, "train", rare)
    assert time.process_time() - started < 5
    puzzle_set.cache_clear()
