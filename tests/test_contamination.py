"""Leaks: what runs and the built-in model were trained on, and how many of an evaluation's puzzles are among it."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from grpo_cli.core.builtin.recipe import RowMaker, may_imitate
from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.evals.contamination import Known, known, overlap
from grpo_cli.core.model.load import load, load_tokenizer
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.plugin import Item
from grpo_cli.core.task.puzzle import Puzzle

SEEN, ASKED_AGAIN, NEW, VAL = (
    Puzzle(*puzzle) for puzzle in (((3, 5, 2), 13), ((2, 3, 5), 13), ((1, 2, 3), 6), ((2, 4, 6), 12))
)
HUB = "owner/name"


def make_run(root: Path, name: str, *puzzles: Puzzle, start: str) -> Run:
    run = Run.create(root, name)
    settings = resolve(flags={"model.model": start}, has_cuda=lambda: False).settings
    run.write_config(settings.model_dump())
    run.log_samples(
        {"step": step, "numbers": list(puzzle.numbers), "target": puzzle.target}
        for step, puzzle in enumerate(puzzles, 1)
    )
    return run


def counts(found: Known) -> Mapping[str, int]:
    return {name: len(seen) for name, seen in found.runs.items()}


def test_a_puzzle_is_the_same_whatever_the_order_of_its_numbers(tmp_path: Path) -> None:
    make_run(tmp_path, "first", SEEN, ASKED_AGAIN, start=HUB)
    found = known("first", tmp_path)
    assert found.runs == {"first": {"2 3 5 -> 13"}}
    assert overlap([ASKED_AGAIN, NEW, VAL, Puzzle((2, 3, 5), 14)], found) == 1


def test_a_run_was_trained_on_what_its_starting_models_were(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first", SEEN, start="builtin")
    second = make_run(tmp_path, "second", VAL, start=str(first.model_path))
    make_run(tmp_path, "third", NEW, start="second")
    third = known("third", tmp_path)
    assert counts(third) == {"third": 1, "second": 1, "first": 1}
    assert third.recipe and third.unknown is None
    assert VAL in third and VAL not in known("first", tmp_path)
    assert known(str(second.model_path), Path("elsewhere")) == known("second", tmp_path)


def test_a_checkpoint_was_trained_on_what_its_run_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, "first", SEEN, start=HUB)
    for model in (run.checkpoint_path(3) / "model", run.warm_start_path):
        model.mkdir(parents=True)
        assert counts(known(str(model), tmp_path)) == {"first": 1}


def test_the_recipe_saw_all_train_puzzles_of_three_and_four_numbers_and_no_others() -> None:
    builtin = known("builtin", Path("none"))
    assert overlap(enumerate_puzzles(3, "train"), builtin) == 2179
    assert overlap(enumerate_puzzles(4, "train"), builtin) == 28209
    assert overlap([*enumerate_puzzles(3, "val"), *enumerate_puzzles(4, "val")], builtin) == 0
    assert overlap([Puzzle((1, 2), 3), Puzzle((1, 2, 3, 4, 5), 15)], builtin) == 0


def test_the_recipe_draws_nothing_but_what_counts_as_seen() -> None:
    maker = RowMaker(load_tokenizer("builtin"), random.Random(5))
    drawn = [maker.puzzle() for _ in range(3_000)]
    assert [puzzle for puzzle in drawn if not may_imitate(puzzle)] == []
    assert {len(puzzle.numbers) for puzzle in drawn} == {3, 4}
    assert max(max(puzzle.numbers) for puzzle in drawn) == 16


@pytest.mark.parametrize("model", [HUB, "/nowhere", "."])
def test_of_other_models_nothing_is_known(tmp_path: Path, model: str) -> None:
    found = known(model, tmp_path)
    assert overlap([SEEN], found) is None
    assert found.statement([SEEN]) == f"what {model} was trained on is not known"


def test_problems_of_other_tasks_are_counted_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, "first", start="builtin")
    run.log_samples([{"step": 1, **Item("[3, 1]").record()}])
    found = known("first", tmp_path)
    assert overlap([Item("[3, 1]"), Item("[1, 3]")], found) == 1
    assert found.statement([Item("[3, 1]")]).startswith(
        "1 of 1 problems were trained on (compared with the 1 of first and all"
    )


def test_runs_that_name_each_other_end(tmp_path: Path) -> None:
    make_run(tmp_path, "a", SEEN, start="b")
    make_run(tmp_path, "b", VAL, start="a")
    assert counts(known("a", tmp_path)) == {"a": 1, "b": 1}


def test_the_statement_says_how_much_is_known_from_where(tmp_path: Path) -> None:
    make_run(tmp_path, "first", SEEN, start="builtin")
    make_run(tmp_path, "other", SEEN, NEW, start=HUB)
    assert known("first", tmp_path).statement([VAL, SEEN]) == (
        "1 of 2 puzzles were trained on"
        " (compared with the 1 of first and all train puzzles of 3 and 4 numbers by the recipe of builtin)"
    )
    assert known("other", tmp_path).statement([VAL]) == (
        "0 of 1 puzzles were trained on (compared with the 2 of other; what owner/name was trained on is not known)"
    )


def test_a_run_without_samples_tells_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, "first", start="builtin")
    assert overlap([SEEN], known("first", tmp_path)) is None


def test_a_run_named_builtin_is_not_the_built_in_model(tmp_path: Path) -> None:
    make_run(tmp_path, "first", VAL, start=HUB).path.rename(tmp_path / "builtin")
    assert known("builtin", tmp_path) == Known(recipe=True)


def test_a_run_from_other_weights_called_builtin_did_not_start_from_the_recipe(tmp_path: Path) -> None:
    run = make_run(tmp_path, "first", SEEN, start="builtin")
    run.write_origin({"weights": load("builtin", device="cpu", precision="auto").fingerprint()["weights"]})
    assert known("first", tmp_path).recipe
    run.write_origin({"weights": "others"})
    assert not known("first", tmp_path).recipe
    assert "other weights" in known("first", tmp_path).statement([VAL])


@pytest.mark.faults
def test_damaged_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path, "first", SEEN, start="builtin")
    damage = ["{", "[1]", "\0", *map(json.dumps, ({"step": 2}, {"step": 2, "numbers": [1, "2"], "target": 3}))]
    with (run.path / "samples.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in damage)
    found = known("first", tmp_path)
    assert counts(found) == {"first": 1}
    assert "; 5 damaged lines of samples left out)" in found.statement([VAL])
