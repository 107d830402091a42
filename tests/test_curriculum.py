"""What a training is shown: schedules, mixtures, and the puzzles of each step."""

from collections import Counter

import pytest

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.rl.schedule import Problems, longest_prompt
from grpo_cli.core.task.curriculum import Curriculum, problems_of_step, schedule
from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.task import Problem

NUMBERS = ("3", "4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one-shot", {1: {"one-shot": 1.0}, 99: {"one-shot": 1.0}}),
        (
            "{one-shot = 0.5, zero-shot = 0.5}",
            {1: {"one-shot": 0.5, "zero-shot": 0.5}, 7: {"one-shot": 0.5, "zero-shot": 0.5}},
        ),
        ("one-shot=3,natural=1", {4: {"one-shot": 0.75, "natural": 0.25}}),
        ("one-shot=1, zero-shot=0", {1: {"one-shot": 1.0}}),
        (
            "one-shot -> zero-shot, linear over 4 steps",
            {
                1: {"one-shot": 1.0, "zero-shot": 0.0},
                2: {"one-shot": 0.75, "zero-shot": 0.25},
                5: {"one-shot": 0.0, "zero-shot": 1.0},
                50: {"one-shot": 0.0, "zero-shot": 1.0},
            },
        ),
        ("one-shot->natural over 1 step", {1: {"one-shot": 1.0, "natural": 0.0}, 2: {"one-shot": 0.0, "natural": 1.0}}),
        (
            "one-shot = 1, zero-shot = 1 -> natural over 2 steps",
            {2: {"one-shot": 0.25, "zero-shot": 0.25, "natural": 0.5}},
        ),
    ],
)
def test_the_weights_of_a_schedule_worked_out_by_hand(text: str, expected: dict[int, dict[str, float]]) -> None:
    found = schedule(text, STYLES)
    assert {step: found.weights(step) for step in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "one", "oneshot", "one-shot, zero-shot", "one-shot = 0", "one-shot = -1, zero-shot = 2", "one-shot = nan",
        "one-shot = 1, one-shot = 2", "one-shot -> zero-shot", "one-shot -> zero-shot over 0 steps",
        "one-shot then zero-shot after 3 steps", "one-shot = 1, zero-shot = 1 then natural after 2 steps",
        "one-shot -> zero-shot -> natural over 3 steps", "one-shot = 1e999", "=", "3",
        "one-shot -> zero-shot over 99999999999 steps", "one-shot = ", "{}", "one-shot over 3 steps",
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not one of|weight|step|twice"):
        schedule(text, STYLES)


def test_draws_come_as_often_as_their_weights_say() -> None:
    mixture = schedule("one-shot = 1, zero-shot = 3", STYLES)
    drawn = Counter(mixture.draw(step, f"0/style/{index}") for step in range(1, 501) for index in range(8))
    assert 0.72 < drawn["zero-shot"] / 4000 < 0.78  # 0.75, within more than four standard deviations
    assert drawn["natural"] == 0


def test_a_fading_schedule_draws_what_its_weights_say_at_each_step() -> None:
    fade = schedule("3 -> 4, linear over 10 steps", NUMBERS)
    shares = [sum(fade.draw(step, str(index)) == "4" for index in range(400)) / 400 for step in (1, 6, 11)]
    assert shares[0] == 0 and 0.4 < shares[1] < 0.6 and shares[2] == 1


def a_curriculum(numbers: str = "3 = 1, 4 = 1", style: str = "one-shot = 1, zero-shot = 1") -> Curriculum:
    puzzles = {size: list(enumerate_puzzles(3, "val"))[size::2] for size in (3, 4)}  # who belongs where is no matter
    return Curriculum(puzzles, schedule(numbers, NUMBERS), schedule(style, STYLES), 8, 5)


def test_the_prompts_of_a_step_are_always_the_same_and_those_of_a_later_turn_others() -> None:
    assert a_curriculum().prompts(3) == a_curriculum().prompts(3)
    assert a_curriculum().prompts(3) != a_curriculum().prompts(4)
    assert a_curriculum().prompts(3) != a_curriculum().prompts(3, turn=1) != a_curriculum().prompts(3, turn=2)


def test_styles_and_numbers_are_drawn_for_each_prompt_on_its_own() -> None:
    mixed = a_curriculum()
    steps = [mixed.prompts(step) for step in range(1, 41)]
    kinds = Counter((style, puzzle in mixed.problems[4]) for prompts in steps for puzzle, style in prompts)
    assert len(kinds) == 4 and min(kinds.values()) > 40  # of 320, 80 expected of each
    assert any(len({style for _, style in prompts}) == 2 for prompts in steps)


def test_without_a_schedule_a_curriculum_is_the_plain_order_of_the_puzzles() -> None:
    plain = a_curriculum("3", "natural")
    for step in (1, 20, 40):
        expected = problems_of_step(plain.problems[3], step, batch_size=8, seed=5)
        assert plain.prompts(step) == [(puzzle, "natural") for puzzle in expected]
    assert plain.shares(plain.prompts(1)) == {}


def test_a_mixture_changes_the_order_of_no_size() -> None:
    plain, mixed = a_curriculum("3", "one-shot"), a_curriculum(style="one-shot")
    for step in range(1, 20):
        for (expected, _), (found, _) in zip(plain.prompts(step), mixed.prompts(step), strict=True):
            assert found == expected or found in mixed.problems[4]


def test_shares_count_the_prompts_of_a_step() -> None:
    mixed = a_curriculum()
    three: Problem = Puzzle((3, 5, 2), 13)
    prompts = [(three, "one-shot")] * 3 + [(Puzzle((1, 2, 3, 4), 10), "zero-shot")]
    assert mixed.shares(prompts) == {
        "prompts/one-shot": 0.75,
        "prompts/zero-shot": 0.25,
        "prompts/3 numbers": 0.75,
        "prompts/4 numbers": 0.25,
    }


def test_memory_is_planned_for_the_longest_prompt_of_a_fade() -> None:
    def longest(style: str) -> int:
        settings = resolve(flags={"train.prompt_style": style}, has_cuda=lambda: False).settings
        problems = Problems.of(settings)
        return longest_prompt(settings, problems, lambda messages: [0] * sum(len(part["content"]) for part in messages))

    assert longest("zero-shot") < longest("zero-shot -> one-shot over 9 steps")
