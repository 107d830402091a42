"""Evaluation: exact arithmetic on hand-made completions, and the same completions however the batch is cut."""

from dataclasses import replace

import pytest

from grpo_cli.core.evaluate import Completion, Evaluation, Paired, evaluate, paired, puzzle_set, wilson
from grpo_cli.core.policy import Policy
from grpo_cli.core.puzzle import Puzzle
from grpo_cli.core.task import score

EASY, HARD = Puzzle((2, 4, 6), 12), Puzzle((2, 4, 6), 36)  # 2 + 4 + 6 and others; (2 + 4) * 6 alone
OTHER = Puzzle((2, 4, 6), 20)
RIGHT, WRONG = "<think>x</think><answer>2 + 4 + 6</answer>", "<answer>2 + 4</answer>"


def completion(puzzle: Puzzle, text: str, length: int) -> Completion:
    return Completion(puzzle, text, length, False, score(text, puzzle))


def made(*rows: list[Completion]) -> Evaluation:
    return Evaluation("m", "val", "one-shot", 3, len(rows[0]), 1.0, list(rows))


def test_every_figure_by_hand() -> None:
    result = made(
        [completion(EASY, RIGHT, 10), completion(EASY, WRONG, 20)],
        [completion(HARD, RIGHT, 30), completion(HARD, "nothing", 40)],
    )
    assert result.count == 2
    assert result.accuracy == 0.25
    assert result.pass_at_k == 0.5
    assert result.format_rate == 0.5
    assert result.mean_length == 25.0
    assert result.reasons == {"correct": 1, "wrong_numbers": 1, "wrong_value": 1, "no_answer": 1}
    assert result.slices["needs parentheses"] == (0, 2)
    assert result.slices["no parentheses needed"] == (1, 2)
    assert result.slices["one solution"] == (0, 2)
    assert result.interval == wilson(0.25, 2)


def test_one_sample_has_no_pass_at_k() -> None:
    assert made([completion(EASY, RIGHT, 1)]).pass_at_k is None


def test_lenient_accuracy_counts_what_the_strict_score_does_not() -> None:
    result = made([completion(EASY, "<answer>2 + 4 + 6 = 12</answer>", 1)])
    assert (result.accuracy, result.lenient_accuracy) == (0.0, 1.0)


def test_cheats_are_counted_by_kind() -> None:
    answers = ["2 + 4 + 6", "6 + 6", "12", "twelve", "2 + 4"]
    result = made(*[[completion(EASY, f"<think>x</think><answer>{answer}</answer>", 1)] for answer in answers])
    assert result.cheats == result.to_json()["cheats"] == {"numbers": 2, "not_arithmetic": 1}
    assert made([completion(EASY, RIGHT, 1)]).cheats == {}


def test_a_comparison_lists_the_puzzles_that_one_model_alone_solves() -> None:
    base = made([completion(EASY, RIGHT, 1)], [completion(HARD, WRONG, 1)], [completion(OTHER, WRONG, 1)])
    better = made(
        [completion(EASY, RIGHT, 1)],
        [completion(HARD, "<answer>(2 + 4) * 6</answer>", 1)],
        [completion(OTHER, RIGHT, 1)],
    )
    found = paired(base, better)
    assert found is not None
    assert [pair[1].puzzle for pair in found.gained] == [HARD] and found.lost == []
    assert paired(better, base) == Paired("m", "m", [], [(two, one) for one, two in found.gained])


def test_only_the_same_puzzles_with_one_completion_each_are_compared() -> None:
    one, other = made([completion(EASY, RIGHT, 1)]), made([completion(HARD, RIGHT, 1)])
    assert paired(one, other) is None
    assert paired(one, made([completion(EASY, RIGHT, 1)], [completion(HARD, RIGHT, 1)])) is None
    assert paired(one, made([completion(EASY, RIGHT, 1)] * 2)) is None


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 0.0625),  # 2 / 32
        (6, 0, 0.03125),
        (0, 6, 0.03125),
        (8, 2, 0.109375),  # 2 * (1 + 10 + 45) / 1024
        (3, 3, 1.0),  # 2 * 42 / 64, capped
        (180, 3, 1.66651e-49),  # 2 * (1 + 183 + 16653 + 1004731) / 2**183
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, p_value: float) -> None:
    pair = (completion(EASY, RIGHT, 1), completion(EASY, WRONG, 1))
    assert Paired("a", "b", [pair] * gained, [pair] * lost).p_value == pytest.approx(p_value, rel=1e-3)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [
        (0.5, 10, 0.236593, 0.763407),
        (0.0, 10, 0.0, 0.277533),
        (1.0, 10, 0.722467, 1.0),
        (0.8, 327, 0.753274, 0.839759),
    ],
)
def test_wilson_interval(share: float, count: int, low: float, high: float) -> None:
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-5)


def test_json_has_the_promised_keys() -> None:
    promised = "model split style numbers count accuracy interval lenient_accuracy format_rate mean_length reasons"
    assert set(promised.split()) <= made([completion(EASY, RIGHT, 1)]).to_json().keys()


def test_all_val_puzzles_are_the_default_set() -> None:
    assert len(puzzle_set(3, "val")) == 327
    assert {puzzle.split for puzzle in puzzle_set(3, "train")} == {"train"}


def test_a_set_too_large_to_enumerate_is_a_fixed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.evaluate.GENERATED", 20)
    assert puzzle_set(5, "val") == puzzle_set(5, "val")
    assert all(len(puzzle.numbers) == 5 for puzzle in puzzle_set(5, "val"))


@pytest.mark.parametrize(("samples", "temperature"), [(1, 0.0), (3, 1.0)])
def test_the_batch_size_does_not_change_the_completions(tiny_policy: Policy, samples: int, temperature: float) -> None:
    policy = replace(tiny_policy, end_ids=tuple(range(0, 832, 16)))
    puzzles = puzzle_set(3, "val")[:5]
    found = [
        evaluate(
            policy,
            puzzles,
            style="zero-shot",
            max_new_tokens=16,
            samples=samples,
            temperature=temperature,
            batch_size=batch_size,
        )
        for batch_size in (1, 6, 100)
    ]
    texts = [[[item.text for item in row] for row in result.completions] for result in found]
    assert texts[0] == texts[1] == texts[2]
    assert all(len(row) == samples for row in texts[0])
