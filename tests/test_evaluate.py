"""Evaluation: exact arithmetic on hand-made completions, and the same completions however the batch is cut."""

from dataclasses import replace

import pytest

from grpo_cli.core.evals.compare import Paired, paired, suite_paired
from grpo_cli.core.evals.contamination import Known
from grpo_cli.core.evals.evaluate import (
    Completion,
    Evaluation,
    Evaluator,
    SuiteResult,
    puzzles_of,
)
from grpo_cli.core.evals.statistics import wilson
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.data import puzzle_set
from grpo_cli.core.task.plugin import FileTask, Item
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score
from grpo_cli.core.task.suite import Cell, cell

EASY, HARD = Puzzle((2, 4, 6), 12), Puzzle((2, 4, 6), 36)  # 2 + 4 + 6 and others; (2 + 4) * 6 alone
OTHER = Puzzle((2, 4, 6), 20)
RIGHT, WRONG = "<think>x</think><answer>2 + 4 + 6</answer>", "<answer>2 + 4</answer>"


def completion(puzzle: Puzzle, text: str, length: int) -> Completion:
    return Completion(puzzle, text, length, False, score(text, puzzle))


def made(*rows: list[Completion]) -> Evaluation:
    return Evaluation("m", "val", "one-shot", 3, len(rows[0]), 1.0, 160, 0, list(rows))


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
    assert result.interval == pytest.approx(wilson(0.25, 3))  # variance 1/16 of the mean, 3/16 of a trial


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


def test_json_has_the_promised_keys() -> None:
    promised = "model split style numbers count accuracy interval lenient_accuracy format_rate mean_length reasons"
    assert set(promised.split()) <= made([completion(EASY, RIGHT, 1)]).to_json().keys()


@pytest.mark.parametrize(("samples", "temperature"), [(1, 0.0), (3, 1.0)])
def test_the_batch_size_does_not_change_the_completions(tiny_policy: Policy, samples: int, temperature: float) -> None:
    policy = replace(tiny_policy, end_ids=tuple(range(0, 832, 16)))
    puzzles = puzzle_set(3, "val")[:5]
    found = [
        Evaluator(LocalEngine(policy), SamplingParams(16, temperature, samples), batch_size=batch_size).evaluate(
            puzzles, style="zero-shot", split="val"
        )
        for batch_size in (1, 6, 100)
    ]
    texts = [[[item.text for item in row] for row in result.completions] for result in found]
    assert texts[0] == texts[1] == texts[2]
    assert all(len(row) == samples for row in texts[0])


def test_a_limit_takes_a_sample_that_is_the_same_every_time() -> None:
    whole, few, more = (puzzles_of(Cell("val", 3, "natural"), limit) for limit in (0, 20, 40))
    assert whole == puzzle_set(3, "val") == puzzles_of(Cell("val", 3, "natural"), 999)
    assert len(few) == 20 and few == puzzles_of(Cell("val", 3, "one-shot"), 20)
    assert few != whole[:20] and [puzzle for puzzle in whole if puzzle in set(few)] == few
    assert len(more) == 40


def test_results_are_comparable_where_their_protocol_is_the_same() -> None:
    result = made([completion(EASY, RIGHT, 10)], [completion(HARD, RIGHT, 10)])
    same = replace(
        result, model="other", completions=[[replace(one, text="x") for one in row] for row in result.completions]
    )
    assert same.protocol == result.protocol
    others = [
        replace(result, style="natural"),
        replace(result, temperature=0.5),
        replace(result, max_new_tokens=161),
        replace(result, seed=1),
        replace(result, completions=result.completions[::-1]),
        replace(result, completions=result.completions[:1]),
    ]
    assert len({one.protocol for one in (result, *others)}) == 7
    item, other = (Item(f'{{"answer": {answer}, "question": "?"}}') for answer in (1, 2))  # not in the prompt
    asked = replace(result, task=FileTask("mine", {"prompt": lambda value: value["question"]}))
    rows = [[replace(completion(EASY, RIGHT, 10), puzzle=problem)] for problem in (item, other)]
    assert replace(asked, completions=rows[:1]).protocol != replace(asked, completions=rows[1:]).protocol
    greedy = replace(result, temperature=0.0)
    assert greedy.protocol == replace(greedy, seed=1).protocol  # no draws, no seed


def test_a_record_says_who_was_solved_and_shows_the_same_puzzles_every_time() -> None:
    rows = [[completion(EASY, text, 10)] for text in (RIGHT, WRONG, RIGHT, "none", RIGHT, WRONG, RIGHT)]
    record = made(*rows).record()
    assert record["cell"] == "val 3 one-shot" and record["solved"] == "1010101"
    assert record["puzzles"] != made(*rows[:1]).record()["puzzles"]
    examples = record["examples"]
    assert isinstance(examples, list)
    assert [one["completion"] for one in examples] == [RIGHT, RIGHT, RIGHT, RIGHT]  # of puzzles 0, 2, 4 and 6
    assert len(made(*rows[:2]).record()["examples"]) == 2  # type: ignore[arg-type]


def test_a_puzzle_that_was_trained_on_is_counted() -> None:
    result = made([completion(EASY, RIGHT, 1)], [completion(HARD, RIGHT, 1)])
    assert result.overlap is None
    seen = Known({"first": frozenset({"2 4 6 -> 12"})})
    assert replace(result, known=seen).overlap == replace(result, known=seen).to_json()["overlap"] == 1
    assert replace(result, known=Known(unknown="hub")).to_json()["overlap"] is None


def a_suite(**solved: int) -> SuiteResult:
    """Cells of eight puzzles each, of which so many are solved."""
    puzzle = [completion(EASY, WRONG, 1)], [completion(EASY, RIGHT, 1)]
    cells = [
        replace(made(*(puzzle[index < count] for index in range(8))), style=style, temperature=0.0)
        for style, count in zip(STYLES, solved.values(), strict=True)
    ]
    weights = {"val 3 one-shot": 1.0, "val 3 zero-shot": 3.0, "val 3 natural": 0.0}
    return SuiteResult("m", cells, weights, 1.0)


def test_the_mean_of_a_suite_is_weighted() -> None:
    assert a_suite(one=4, zero=8, natural=0).mean == pytest.approx(0.875)  # (1 * 0.5 + 3 * 1.0 + 0 * 0.0) / 4


def test_the_puzzles_of_a_suite_are_counted_once() -> None:
    assert a_suite(one=0, zero=0, natural=0).puzzles == [EASY]


def test_suites_are_compared_cell_by_cell_with_p_corrected_for_their_number() -> None:
    found = suite_paired(a_suite(one=0, zero=0, natural=1), a_suite(one=8, zero=6, natural=0))
    assert found is not None
    assert [(line["cell"], line["gained"], line["lost"], line["p_value"]) for line in found.to_json()] == [
        ("val 3 one-shot", 8, 0, 2 / 256),
        ("val 3 zero-shot", 6, 0, 2 / 64),
        ("val 3 natural", 0, 1, 1.0),
    ]
    assert [line["p_holm"] for line in found.to_json()] == [3 * 2 / 256, 2 * 2 / 64, 1.0]


def test_several_completions_of_a_puzzle_are_not_compared() -> None:
    once = a_suite(one=1, zero=1, natural=1)
    twice = [replace(cell, completions=[row * 2 for row in cell.completions], samples=2) for cell in once.cells]
    assert suite_paired(once, replace(once, cells=twice)) is None


def test_a_suite_is_evaluated_as_its_cells_would_be(tiny_policy: Policy) -> None:
    policy = replace(tiny_policy, end_ids=tuple(range(0, 832, 16)))
    cells = [cell("val 3 zero-shot"), cell("train 4 natural")]
    asked = {cell: puzzles_of(cell, limit) for cell, limit in zip(cells, (5, 3), strict=True)}
    told: list[tuple[int, int]] = []
    evaluator = Evaluator(LocalEngine(policy), SamplingParams(8, temperature=0.0), batch_size=2)
    weights = {cell.name: 1.0 for cell in cells}
    found = evaluator.evaluate_suite(asked, weights, progress=lambda done, total: told.append((done, total)))
    alone = [evaluator.evaluate(asked[cell], style=cell.style, split=cell.split) for cell in cells]
    assert found.cells == alone
    assert told == [(2, 8), (4, 8), (6, 8), (8, 8)]  # the third batch holds puzzles of both cells
    assert found.decoding == {"samples": 1, "temperature": 0.0, "max_new_tokens": 8}
    hashes = {found.protocol, *(result.protocol for result in alone)}
    assert len(hashes) == 3 and replace(found, cells=alone[:1]).protocol == alone[0].protocol
