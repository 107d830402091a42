"""The built-in model: honest traces, a tokenizer that survives the round trip, weights worth training."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_cli.core.builtin.recipe import IGNORED, Recipe, RowMaker, build_tokenizer, impatient, patient
from grpo_cli.core.builtin.traces import drill, form_tree, line, reduce, search, trace, write
from grpo_cli.core.evals.evaluate import Evaluator
from grpo_cli.core.model.load import BUILTIN, load
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.data import enumerate_puzzles, puzzle_set
from grpo_cli.core.task.expression import parse
from grpo_cli.core.task.prompts import STYLES, Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score
from grpo_cli.core.task.suite import Cell


@pytest.mark.parametrize(
    ("form", "text", "steps"),
    [
        ("a+b-c", "2 + 6 - 10", ["8 - 10", "-2"]),
        ("c-a-b", "10 - 2 - 6", ["8 - 6", "2"]),
        ("c-a*b", "10 - 2 * 6", ["10 - 12", "-2"]),
        ("(c-a)*d-b", "(10 - 2) * 12 - 6", ["8 * 12 - 6", "96 - 6", "90"]),
        ("(b-c+d)*a", "(6 - 10 + 12) * 2", ["(-4 + 12) * 2", "8 * 2", "16"]),
        ("(a+b)*c", "(2 + 6) * 10", ["8 * 10", "80"]),
        ("a*b*c", "2 * 6 * 10", ["12 * 10", "120"]),
    ],
)
def test_a_form_is_written_and_worked_out_step_by_step(form: str, text: str, steps: list[str]) -> None:
    tree = form_tree(form, (2, 6, 10, 12))
    assert write(tree) == text
    for expected in steps:
        tree = reduce(tree)
        assert write(tree) == expected


def test_a_line_states_the_target_beside_the_value() -> None:
    assert line(("+", ("*", 2, 6), 10), 22) == ("2 * 6 + 10 = 12 + 10 = 22, need 22. Yes!", True)
    assert line(("+", ("*", 2, 6), 10), 24) == ("2 * 6 + 10 = 12 + 10 = 22, need 24. No.", False)


def test_a_patient_search_solves_every_puzzle_of_three_numbers() -> None:
    for puzzle in enumerate_puzzles(3):
        lines, answer = search(puzzle, random.Random(0), patient)
        assert lines[-1].endswith("Yes!")
        found = parse(answer)
        assert found is not None
        assert (found.value, sorted(found.numbers)) == (puzzle.target, sorted(puzzle.numbers))


def test_a_patient_search_solves_a_third_of_the_puzzles_of_four_numbers() -> None:
    puzzles = puzzle_set(4, "val")
    solved = sum(search(puzzle, random.Random(0), patient)[0][-1].endswith("Yes!") for puzzle in puzzles)
    assert 0.35 < solved / len(puzzles) < 0.45


@pytest.mark.parametrize("style", STYLES)
def test_a_trace_is_honest_and_its_answer_is_read_as_written(style: Style) -> None:
    rng = random.Random(1)
    for puzzle in [*list(enumerate_puzzles(3, "train"))[::20], *list(enumerate_puzzles(3, "val"))[::20]]:
        text = trace(puzzle, rng, style=style, patience=impatient)
        assert ("Yes!" in text) == score(text, puzzle, style=style).correct
        for row in text.splitlines():
            if ", need " in row:
                parts = [parse(part) for part in row.partition(", need ")[0].split(" = ")]
                values = {part.value for part in parts if part is not None}
                assert len(values) == 1 and None not in parts
                assert row.endswith("Yes!") == (values == {puzzle.target})


@pytest.mark.parametrize("numbers", [None, (3, 8, 11), (2, 5, 6, 9)])
def test_a_drill_is_true_arithmetic_with_a_true_verdict(numbers: tuple[int, ...] | None) -> None:
    rng = random.Random(0)
    rows = [drill(rng, numbers) for _ in range(200)]
    for row in rows:
        work, _, need = row.partition(", need ")
        parts = [parse(part) for part in work.split(" = ")]
        assert parts[0] is not None and len(parts[0].numbers) == len(numbers or (1, 2))
        values = {part.value for part in parts if part is not None}
        assert len(values) == 1 and None not in parts
        assert need.endswith("Yes!") == (values == {int(need.partition(".")[0])})
    assert 0.4 < sum(row.endswith("Yes!") for row in rows) / len(rows) < 0.7


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(Recipe())


def test_a_verdict_follows_its_target_at_once(tokenizer: Any) -> None:
    tokens = [
        tokenizer.decode([token]) for token in tokenizer("= 18, need 22. No.\n= 22, need 22. Yes!\n")["input_ids"]
    ]
    assert tokens == ["=", " 18", ", need", " 22", ". No.\n", "=", " 22", ", need", " 22", ". Yes!\n"]


def test_nothing_imitated_is_a_val_puzzle(tokenizer: Any) -> None:
    maker = RowMaker(tokenizer, random.Random(3))
    puzzles = [maker.puzzle() for _ in range(3000)]
    assert {puzzle.split for puzzle in puzzles} == {"train"}
    assert {len(puzzle.numbers) for puzzle in puzzles} == {3, 4}


def test_only_the_completion_is_learned(tokenizer: Any) -> None:
    maker = RowMaker(tokenizer, random.Random(3))
    for _ in range(20):
        row = maker.row(patient, drills=0.2)
        learned = [token for token in row.labels if token != IGNORED]
        assert all(label in (IGNORED, token) for token, label in zip(row.tokens, row.labels, strict=True))
        text = tokenizer.decode(row.tokens)
        if "assistant" in text:
            assert tokenizer.decode(learned) == text.rpartition("assistant\n")[2]


def test_numbers_are_one_token_each_and_every_text_comes_back(tokenizer: Any) -> None:
    tokens = tokenizer("2 * 60 - 110 = 120 - 110 = 10, need 10. Yes!")["input_ids"]
    assert [tokenizer.decode([token]) for token in tokens][:5] == ["2", " *", " 60", " -", " 110"]
    for text in ("ümläut ☃ 12345 -7", "<think>\n(1 + 2) * 3\n</think>", "\t\r\n  x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_shipped_model_opens_with_transformers_alone_and_gives_the_same_ids_and_logits() -> None:
    policy = load("builtin", device="cpu", precision="float32")
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    messages = prompt(Puzzle((2, 6, 10), 22), "one-shot")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert ids == policy.encode(messages)
    peer = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids) :].tolist()
    evaluator = Evaluator(LocalEngine(policy), SamplingParams(60, 0.0))
    ours = evaluator.evaluate([Puzzle((2, 6, 10), 22)], style="one-shot", split="val")
    assert policy.decode(peer) == ours.completions[0][0].text


def test_the_shipped_model_is_small() -> None:
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) < 6_000_000
    assert 1e6 < load("builtin", device="cpu").model.num_parameters() < 3e6
    assert json.loads((BUILTIN / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def test_the_shipped_model_is_worth_training() -> None:
    """It solves some puzzles of each style and gives up on more: both outcomes are what reinforcement needs."""
    evaluator = Evaluator(LocalEngine(load("builtin", device="cpu")), SamplingParams(400, 0.0))
    asked = {Cell("val", 3, style): puzzle_set(3, "val")[::16] for style in STYLES}
    for found in evaluator.evaluate_cells(asked).values():
        assert 0.15 < found.accuracy < 0.75
        assert sum("I give up." in row[0].text for row in found.completions) > 0.2 * found.count


@pytest.mark.slow
def test_the_recipe_is_reproducible(tmp_path: Path) -> None:
    from grpo_cli.core.builtin.recipe import make

    recipe = Recipe(width=32, layers=1, mlp_width=32, search_steps=2, give_up_steps=1, tokens_per_step=256)
    reports: list[list[tuple[str, int, float]]] = [[], []]
    for kept in reports:
        make(recipe, lambda *report: kept.append(report))  # noqa: B023 - called within the iteration
    assert reports[0] == reports[1]
    assert [report[:2] for report in reports[0]] == [("search", 1), ("search", 2), ("give up", 1)]
