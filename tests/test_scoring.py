"""The prompt, the scoring contract case by case, and hostile completions."""

import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.prompts import EXAMPLE, STYLES, WORKED_EXAMPLE, Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import Reason, Rewards, Score, score
from grpo_cli.core.task.solver import solve

P13 = Puzzle((3, 5, 2), 13)
TAGGED: list[Style] = ["one-shot", "zero-shot"]


def answered(answer: str, puzzle: Puzzle, style: Style = "one-shot") -> Score:
    return score(f"<think>\nLet me see.\n</think>\n<answer>{answer}</answer>", puzzle, style=style)


CONTRACT: list[tuple[str, Puzzle, Reason, bool]] = [
    ("5 * 2 + 3", P13, "correct", True),
    ("\n5*2 + 3\n", P13, "correct", True),
    ("(3 + 2) * 5", Puzzle((3, 5, 2), 25), "correct", True),
    ("-2 + 5 * 3", P13, "correct", True),
    ("5 * 2 - -3", P13, "correct", True),
    ("2 * 5.5", Puzzle((2, 5, 5), 11), "not_an_expression", False),
    ("2**3 + 5", Puzzle((2, 3, 5), 13), "not_an_expression", False),
    ("7 // 2 + 10", Puzzle((7, 2, 10), 13), "not_an_expression", False),
    ("5 * 2 + 3 = 13", P13, "not_an_expression", True),
    ("5 * 2 + 3 = 99", P13, "not_an_expression", False),
    ("5 × 2 + 3", P13, "not_an_expression", True),
    ("5 * 3 - 2 + 0", P13, "wrong_numbers", False),
    ("10 + 3", P13, "wrong_numbers", False),
    ("5 + 2 + 3", P13, "wrong_value", False),
    ("53 + 2", Puzzle((3, 5, 2), 55), "wrong_numbers", False),
    ("(" * 5000, P13, "not_an_expression", False),
]

HOSTILE: list[tuple[str, Reason]] = [
    ("13 # 3 5 2", "not_an_expression"),
    ("13 + 0 * (3 + 5 + 2)", "wrong_numbers"),
    ("5 * 2 + 3 * True", "not_an_expression"),
    ("9**9**9**9", "not_an_expression"),
    ("5(2) + 3", "not_an_expression"),
    ("5 * 2 + 3\x00", "not_an_expression"),
    ("5 * 2 + \uff13", "not_an_expression"),
    ("__import__('os').getcwd()", "not_an_expression"),
    ("", "not_an_expression"),
    ("(" * 64 + "5 * 2 + 3" + ")" * 64, "correct"),
    ("(" * 65 + "5 * 2 + 3" + ")" * 65, "not_an_expression"),
    ("-" * 246 + "5 * 2 + 3", "correct"),
    ("-" * 248 + "5 * 2 + 3", "not_an_expression"),
    ("1" * 256, "wrong_numbers"),
    ("1" * 10**6, "not_an_expression"),
    ("3 5 2 " * 10**5, "not_an_expression"),
]


@pytest.mark.parametrize(("answer", "puzzle", "reason", "lenient"), CONTRACT)
def test_the_contract(answer: str, puzzle: Puzzle, reason: Reason, lenient: bool) -> None:
    correct = reason == "correct"
    expected = Score(1.0 if correct else 0.2, correct, reason, answer.strip(), well_formed=True, lenient=lenient)
    for style in TAGGED:
        assert replace(answered(answer, puzzle, style), cheat=None) == expected


@pytest.mark.faults
@pytest.mark.parametrize(("answer", "reason"), HOSTILE, ids=lambda value: repr(value[:20]))
def test_hostile_answers_neither_pay_nor_raise(answer: str, reason: Reason) -> None:
    assert answered(answer, P13).reason == reason


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> then <answer>2</answer>", "2"),
        ("<think>like <answer>1</answer></think><answer>2</answer>", "2"),
        ("<answer>1</answer> and <answer>2", "1"),
        ("<answer>1</answer> and </answer>", "1"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer> \n 1 + 1 \t\n</answer>", "1 + 1"),
        ("<answer></answer>", ""),
        ("<answer>1", None),
        ("1</answer>", None),
        ("</answer>1<answer>", None),
        ("<ANSWER>1</ANSWER>", None),
        ("5 * 2 + 3", None),
        ("", None),
    ],
)
def test_the_last_complete_pair_holds_the_answer(completion: str, answer: str | None) -> None:
    result = score(completion, P13)
    assert result.answer == answer
    assert (result.reason == "no_answer") == (answer is None)


@pytest.mark.parametrize(
    ("completion", "reward", "well_formed"),
    [
        ("", 0.0, False),
        ("<think></think>", 0.1, False),
        ("<answer></answer>", 0.1, False),
        ("<think></think><answer></answer>", 0.2, True),
        ("<answer></answer><think></think>", 0.2, True),
        ("<think></think><think></think><think></think>", 0.1, False),
        ("<think>", 0.0, False),
        ("</think><think>", 0.0, False),
        ("</think><think></think>", 0.1, False),
        ("<think>no end <answer>5</answer>", 0.1, False),
        ("< think ></ think >", 0.0, False),
    ],
)
def test_each_tag_pair_earns_a_tenth_in_every_style(completion: str, reward: float, well_formed: bool) -> None:
    for style in STYLES:
        result = score(completion, P13, style=style)
        assert (result.reward, result.well_formed) == (reward, well_formed)


@pytest.mark.parametrize(
    ("completion", "style", "reason"),
    [
        ("<think>3 + 5", "one-shot", "truncated"),
        ("<think></think><answer>5 *", "one-shot", "truncated"),
        ("<answer>5 + 2</answer>", "one-shot", "wrong_numbers"),
        ("<answer>5 *</answer>", "one-shot", "not_an_expression"),
        ("<answer>5 * 2 + 3</answer> and", "one-shot", "correct"),
        ("I think", "natural", "truncated"),
        ("I try 5 + 2", "natural", "truncated"),
        ("It is 5 * 2 + 3 = 13, so", "natural", "correct"),
    ],
)
def test_running_out_of_tokens_changes_only_the_reason(completion: str, style: Style, reason: Reason) -> None:
    cut, whole = score(completion, P13, style=style, truncated=True), score(completion, P13, style=style)
    assert cut.reason == reason
    assert (cut.reward, cut.answer, cut.lenient) == (whole.reward, whole.answer, whole.lenient)


@pytest.mark.parametrize(
    ("completion", "reason", "lenient"),
    [
        ("5 * 2 = 10, so 5 * 2 + 3 = 10 + 3 = 13.", "correct", True),
        ("The answer is 5 × 2 + 3 = 13.", "no_answer", True),
        ("3 + 5 + 2 = 10 is wrong, 5 \\times 2 + 3 is right", "wrong_value", True),
        ("5 * 2 = 10 and 10 + 3 = 13", "wrong_numbers", False),
        ("5 + 2 + 3 = 13", "wrong_value", False),
        ("I give up.", "no_answer", False),
        ("It is 2.5 + 3 * 5", "no_answer", False),
        ("5 * 2 + 3 # 13", "correct", True),
        ("True + 2 + 5 * 2", "wrong_numbers", False),
    ],
)
def test_natural_answers(completion: str, reason: Reason, lenient: bool) -> None:
    result = score(completion, P13, style="natural")
    assert (result.reason, result.lenient) == (reason, lenient)


def test_every_solution_of_the_space_scores_full_in_every_style() -> None:
    templates: dict[Style, str] = {
        "one-shot": "<think>\n{0}\n</think>\n<answer>{0}</answer>",
        "zero-shot": "<answer>{0}</answer>",
        "natural": "First I tried 1 + 1 = 2. In the end, {0} = {1} it is.",
    }
    puzzles = list(enumerate_puzzles(3))
    assert len(puzzles) == 2506
    for puzzle in puzzles:
        solutions = solve(puzzle)
        assert solutions
        for style in STYLES:
            for solution in solutions:
                assert score(templates[style].format(solution, puzzle.target), puzzle, style=style).reward == 1.0


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "5 * 2 + 3", "13", "×", "\\times", "**", "1_0", "0x1", "True"]
PIECES += "523+-*()=#. \n\x00\u0663"
FRAGMENTS = st.sampled_from(PIECES) | st.text(max_size=5)


@settings(deadline=None)
@given(st.lists(FRAGMENTS, max_size=20).map("".join), st.sampled_from(STYLES), st.booleans())
def test_a_reward_follows_from_the_answer_and_the_tags_alone(completion: str, style: Style, truncated: bool) -> None:
    result = score(completion, P13, style=style, truncated=truncated)
    expression = parse(result.answer) if result.answer is not None else None
    right = expression is not None and sorted(expression.numbers) == [2, 3, 5] and expression.value == 13
    assert result.correct == right == (result.reason == "correct")
    assert result.lenient or not result.correct
    assert result.reward == 1.0 if right else result.reward in (0.0, 0.1, 0.2)
    assert result.reward > 0.1 or not result.well_formed


def seconds(completion: str, style: Style) -> float:
    """Processor time of scoring a completion, the best of up to three tries."""
    best = math.inf
    for _ in range(3):
        start = time.thread_time()
        score(completion, P13, style=style)
        best = min(best, time.thread_time() - start)
        if best < 0.005:
            break
    return best


def expression_shaped(rng: random.Random, size: int) -> str:
    """An expression of the grammar of `size` numbers, its parentheses as deep as chance has it."""
    if size == 1:
        number = str(rng.choice([2, 3, 5, 10, 99, 10**9]))
        return rng.choice(["", "", "-", "+", "- -"]) + (f"({number})" if rng.random() < 0.1 else number)
    left = rng.randrange(1, size)
    text = rng.choice([" ", ""]).join(
        [expression_shaped(rng, left), rng.choice("+-*"), expression_shaped(rng, size - left)]
    )
    return f"({text})" if rng.random() < 0.5 else text


def grammar_shaped(rng: random.Random) -> str:
    """A completion around an expression, in every fourth one with a character replaced."""
    answer = expression_shaped(rng, rng.choice([1, 2, 3, 3, 3, 4, 8, 30, 200]))
    if rng.random() < 0.25:
        place = rng.randrange(len(answer))
        answer = answer[:place] + rng.choice("()+-*×=/. 0x_^\n") + answer[place + 1 :]
    templates = ["<think>{0}</think>\n<answer>{0}</answer>", "<answer>{0} = 13</answer>", "{0} = 13. So {0}.", "{0}"]
    return rng.choice(templates).format(answer)


@pytest.mark.slow
@pytest.mark.faults
def test_a_million_random_strings_are_scored_none_in_over_five_milliseconds() -> None:
    rng = random.Random(0)
    rewards = set()
    for number in range(1_000_000):
        completion = "".join(rng.choices(PIECES, k=rng.randrange(20)))
        style = STYLES[number % 3]
        start = time.thread_time()
        rewards.add(score(completion, P13, style=style, truncated=number % 2 == 0).reward)
        assert time.thread_time() - start < 0.005 or seconds(completion, style) < 0.005, completion
    assert rewards == {0.0, 0.1, 0.2, 1.0}


@pytest.mark.slow
@pytest.mark.faults
def test_a_hundred_thousand_strings_of_the_grammar_are_scored_none_in_over_five_milliseconds() -> None:
    rng = random.Random(1)
    rewards = set()
    for number in range(100_000):
        completion, style = grammar_shaped(rng), STYLES[number % 3]
        rewards.add(score(completion, P13, style=style).reward)
        assert seconds(completion, style) < 0.005, completion
    assert rewards == {0.0, 0.1, 0.2, 1.0}


@pytest.mark.faults
@pytest.mark.parametrize("piece", ["(", "((1)", "1+", "-", "1 = ", "<answer>", "</answer>", "<think>", "9", "\\times "])
def test_a_megabyte_of_one_piece_is_scored(piece: str) -> None:
    bomb = piece * (1_000_000 // len(piece))
    for completion in (bomb, f"<think></think><answer>{bomb}</answer>"):
        assert all(score(completion, P13, style=style).reward < 1.0 for style in STYLES)


def test_prompts_carry_the_roles_of_their_style() -> None:
    puzzle = Puzzle((4, 7, 3), 25)
    roles = {style: [message["role"] for message in prompt(puzzle, style)] for style in STYLES}
    assert roles == {
        "one-shot": ["system", "user", "assistant", "user"],
        "zero-shot": ["system", "user"],
        "natural": ["system", "user"],
    }
    for style in STYLES:
        question = prompt(puzzle, style)[-1]["content"]
        assert question.startswith("Using the numbers [4, 7, 3], create an expression that equals 25. ")
        assert ("<think>" in question and "<answer>" in question) == (style != "natural")


def test_the_worked_example_is_a_correct_completion_of_its_own_question() -> None:
    _, asked, worked, _ = prompt(Puzzle((4, 7, 3), 25))
    assert asked["content"].startswith("Using the numbers [3, 5, 2], create an expression that equals 13. ")
    assert score(worked["content"], EXAMPLE) == Score(1.0, True, "correct", "5 * 2 + 3", True, True)


def test_each_step_of_the_worked_example_is_true() -> None:
    for line in WORKED_EXAMPLE.split("</think>")[0].splitlines()[1:]:
        *steps, result = line.split(",")[0].split(" = ")
        values = [expression.value for step in steps if (expression := parse(step))]
        assert values == [int(result)] * len(steps)
        assert line.endswith("Yes!" if int(result) == EXAMPLE.target else "No.")


THOUGHT = "<think>x</think>"


@pytest.mark.parametrize(
    ("completion", "cheat"),
    [
        (THOUGHT + "<answer>5 * 2 + 3</answer>", None),
        (THOUGHT + "<answer>10 + 3</answer>", "numbers"),  # left out
        (THOUGHT + "<answer>5 + 5 + 3</answer>", "numbers"),  # reused
        (THOUGHT + "<answer>5 * 3 - 2 + 0</answer>", "numbers"),
        (THOUGHT + "<answer>13</answer>", "numbers"),
        (THOUGHT + "<answer>10 + 4</answer>", None),  # wrong numbers that do not make the target are a mistake
        (THOUGHT + "<answer>5 + 3 + 2</answer>", None),  # and so is a wrong value
        (THOUGHT + "<answer>5 * 2 + 3 = 99</answer>", "not_arithmetic"),
        (THOUGHT + "<answer>five</answer>", "not_arithmetic"),
        (THOUGHT + "<answer></answer>", "not_arithmetic"),
        (THOUGHT + "<answer>(10 + 3 # 2</answer>", "not_arithmetic"),
        (THOUGHT + "<answer>5 * 2 + 3 = 13</answer>", None),  # arithmetic, in another notation
        (THOUGHT + "<answer>5 × 2 + 4</answer>", None),
        ("<answer>5 * 2 + 3</answer>", "no_thought"),
        ("<answer>5 + 3 + 2</answer>", "no_thought"),
        ("<think>x<answer>5 * 2 + 3</answer></think>", "no_thought"),  # the thought is not over
        ("<answer>5 * 2 + 3</answer><think>x</think>", "no_thought"),
        ("</think><think><answer>5 * 2 + 3</answer>", "no_thought"),
        ("<answer>10 + 3</answer>", "numbers"),  # the first kind that applies
        ("<answer>five</answer>", "not_arithmetic"),
        ("<answer>1</answer>" + THOUGHT + "<answer>5 * 2 + 3</answer>", None),
        (THOUGHT, None),
        ("5 * 2 + 3", None),
        ("", None),
    ],
)
def test_attempts_to_cheat_by_kind(completion: str, cheat: str | None) -> None:
    assert {score(completion, P13, style=style).cheat for style in TAGGED} == {cheat}


@pytest.mark.parametrize(
    ("completion", "truncated", "cheat"),
    [
        ("5 * 2 + 3", False, None),  # nobody asked for a thought
        ("So it is 10 + 3.", False, "numbers"),
        ("So it is 10 + 3", True, None),  # it was still going on
        ("I do not know.", False, None),
        ("5 × 2 + 3", False, None),
    ],
)
def test_the_natural_style_asks_for_no_thought(completion: str, truncated: bool, cheat: str | None) -> None:
    assert score(completion, P13, style="natural", truncated=truncated).cheat == cheat


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a</think><answer>5 * 2 + 3</answer>", 2.0),  # in place of all others
        ("<think>a</think><answer>5 + 2 + 3</answer>", 0.75),  # two pairs and the right numbers
        ("<answer>5 + 2 + 3</answer>", 0.625),
        ("<think>a</think><answer>5 + 2 + 4</answer>", 0.25),  # other numbers
        ("<think>a</think><answer>13</answer>", 0.25),
        ("5 + 2 + 3", 0.0),
    ],
)
def test_rewards_are_settings(completion: str, reward: float) -> None:
    rewards = Rewards(format=0.125, numbers=0.5, correct=2.0)
    assert score(completion, Puzzle((3, 5, 2), 13), rewards=rewards).reward == reward
