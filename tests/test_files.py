"""Puzzle files in three formats: written, read back, and every wrong line named."""

import csv
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from conftest import Command

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.countdown import Countdown, PuzzlePaths
from grpo_cli.core.task.data import enumerate_puzzles, generate, write_puzzles
from grpo_cli.core.task.files import SPLITS, load_puzzles
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import Rules
from grpo_cli.core.task.task import require_apart

ALL = Rules("+-*/", 1, 99, 10, 99)


@pytest.fixture(autouse=True)
def nothing_cached() -> None:
    load_puzzles.cache_clear()


@pytest.mark.parametrize("name", ["puzzles.jsonl", "puzzles.csv", "puzzles.parquet"])
def test_puzzles_come_back_from_their_file(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    write_puzzles(path, enumerate_puzzles(3))
    task = Countdown(paths=PuzzlePaths(path))
    for split in SPLITS:
        assert task.problems(split, 3) == Countdown().problems(split, 3)
    assert load_puzzles(path).duplicates == 0
    assert task.files == {"puzzles": hashlib.sha256(path.read_bytes()).hexdigest()} and Countdown().files == {}
    assert task.notes([3])[0].startswith(
        f"{path}: 2,051 train, 128 dev, 327 val puzzles, 0 duplicates left out, SHA-256"
    )


def test_files_of_their_own_are_all_dev_or_all_val(tmp_path: Path) -> None:
    """A dev file's puzzles leave the train pool; with a val file, all unmarked rows of the first are train."""
    odd, even, other, new = ({"nums": numbers, "target": 6} for numbers in ([1, 2, 3], [2, 2, 2], [1, 1, 4], [3, 1, 2]))

    def written(name: str, *rows: dict[str, object]) -> Path:
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return tmp_path / name

    def keys(task: Countdown) -> list[set[str]]:
        return [{puzzle.key for puzzle in task.problems(split, 3)} for split in SPLITS]

    main, dev, val = written("main.jsonl", odd, even, other), written("dev.jsonl", new), written("val.jsonl", other)
    assert keys(Countdown(paths=PuzzlePaths(main, dev))) == [{"1 1 4 -> 6"}, {"1 2 3 -> 6"}, {"2 2 2 -> 6"}]
    task = Countdown(paths=PuzzlePaths(main, dev, val))
    assert keys(task) == [{"2 2 2 -> 6", "1 1 4 -> 6"}, {"1 2 3 -> 6"}, {"1 1 4 -> 6"}]
    assert list(task.files) == ["puzzles", "dev_puzzles", "val_puzzles"] and len(task.notes([3])) == 3
    with pytest.raises(CountdownError, match=r"^1 of 1 val problems are also train problems, first `1 1 4 -> 6`$"):
        require_apart({split: task.problems(split, 3) for split in SPLITS})
    generated = Countdown(paths=PuzzlePaths(dev=dev))
    assert len(generated.problems("train", 3)) == 2178 and len(generated.problems("val", 3)) == 327


def test_rows_may_say_dev(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.jsonl"
    rows = [
        {"nums": [1, 2, number], "target": 3 + number, "split": "dev" if number < 3 else None} for number in (1, 2, 3)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = Countdown(paths=PuzzlePaths(path))
    assert [len(task.problems(split, 3)) for split in ("train", "dev")] == [1, 2]


def test_files_written_with_rules_are_read_with_them(tmp_path: Path) -> None:
    path, puzzles = tmp_path / "public.jsonl", generate(50, numbers=4, seed=1, rules=ALL)
    write_puzzles(path, puzzles, rules=ALL)
    loaded = load_puzzles(path, ALL)
    assert {*loaded.rows["train"], *loaded.rows["val"]} == set(puzzles)
    with pytest.raises(CountdownError, match=r"`solution` does not make|have no solution"):
        load_puzzles(path)


@pytest.mark.parametrize("name", ["public.jsonl", "public.csv", "public.parquet"])
def test_the_public_data_sets_columns_are_read(tmp_path: Path, name: str) -> None:
    rows = [
        {"target": 98, "nums": [44, 19, 35]},
        {"target": 64, "nums": [63, 95, 96]},
        {"target": 28, "nums": [95, 11, 56]},
    ]
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith("csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["target", "nums"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    loaded = load_puzzles(path, ALL)
    assert loaded.rows["train"] == (Puzzle((44, 19, 35), 98), Puzzle((63, 95, 96), 64), Puzzle((95, 11, 56), 28))
    with pytest.raises(CountdownError, match="has no val puzzles"):
        loaded.puzzles("val")


PUZZLE = Puzzle((44, 19, 35), 98)


@pytest.mark.parametrize(
    "row",
    [
        {"target": 98, "numbers": None, "nums": [44, 19, 35]},
        {"target": 98, "nums": [44, 19, 35], "solution": "44 + 19 + 35 = 98"},
        {"target": 98, "nums": [44, 19, 35], "solution": "44 + 19 + 35 = 63 + 35 = 98"},
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_rows_of_other_projects_are_read(tmp_path: Path, row: dict[str, object], ending: str) -> None:
    path = tmp_path / f"other.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row) if ending == "jsonl" else json.dumps([row], indent=2))
    assert load_puzzles(path, Rules(max_number=99)).rows["train"] == (PUZZLE,)


def test_a_wrong_entry_of_a_json_array_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.json"
    for text, message in ((json.dumps([GOOD, 5]), "entry 2: a puzzle is an object"), ("[\n{", "line 1: not JSON")):
        load_puzzles.cache_clear()
        path.write_text(text)
        with pytest.raises(CountdownError, match=message):
            load_puzzles(path)


def test_puzzles_without_a_solution_are_counted_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.jsonl"
    path.write_text('{"nums": [3, 5, 2], "target": 13}\n{"nums": [1, 1], "target": 100}\n')
    with pytest.raises(CountdownError) as caught:
        load_puzzles(path)
    assert caught.value.message == f"1 of 2 puzzles tried have no solution, first `{path}`, line 2: [1, 1] -> 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nums,target\n3 5 x,13\n", "line 2: `numbers` (or `nums`) is a list"),
        ("Numbers,Target\n3 5 2,13\n", "line 2: there is no `numbers` (or `nums`) and no `target`"),
        ("numbers;target\n3 5 2;13\n", "line 2: there is no `numbers` (or `nums`) and no `target`"),
        ("numbers\n3 5 2\n", "line 2: there is no `target`"),
        ("nums,target\n", "has no puzzles"),
        ("nums,target,target\n3 5 2,13,14\n", "has two columns of the same name"),
    ],
)
def test_wrong_lines_of_a_csv_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(text)
    with pytest.raises(CountdownError, match=re.escape(message)):
        load_puzzles(path)


def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "puzzles.parquet"
    path.write_text("no")
    with pytest.raises(CountdownError, match="is not a Parquet file"):
        load_puzzles(path)


GOOD = {"numbers": [3, 5, 2], "target": 13, "split": "train", "solution": "2 * 5 + 3"}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not JSON"),
        ('{"numbers": [3, 5', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[3, 5, 2]", "a puzzle is an object with the fields numbers, target, split, solution"),
        (json.dumps({"numbers": [3, 5, 2]}), "there is no `target`"),
        (json.dumps({"target": 13, "answer": "x"}), "there is no `numbers` (or `nums`)"),
        (json.dumps({**GOOD, "solution": "2 * 5 + 3 = 14"}), "`solution` does not make 13 from [3, 5, 2]"),
        (json.dumps({**GOOD, "solution": "13 = 13"}), "`solution` does not make 13 from [3, 5, 2]"),
        (json.dumps({**GOOD, "numbers": "3 5 2"}), "`numbers` (or `nums`) is a list of whole numbers"),
        (json.dumps({**GOOD, "numbers": [3, True, 2]}), "`numbers` (or `nums`) is a list of whole numbers"),
        (
            json.dumps({**GOOD, "target": float("nan")}),
            "`numbers` (or `nums`) is a list of whole numbers, `target` a",
        ),
        (json.dumps({**GOOD, "numbers": [3]}), "a puzzle has 2 to 6 numbers, not 1"),
        (json.dumps({**GOOD, "target": -13}), "the target of a puzzle lies between 1 and 1000"),
        (json.dumps({**GOOD, "split": "test"}), "`split` is `train`, `dev` or `val`"),
        (json.dumps({**GOOD, "numbers": [2, 3, 5], "split": "val"}), "[2, 3, 5] -> 13 is a train and a val puzzle"),
        (json.dumps({**GOOD, "solution": 13}), "`solution` does not make 13 from [3, 5, 2]"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "puzzles.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(CountdownError, match=re.escape(f"`{path}`, line 2: {message}")):
        load_puzzles(path)


@pytest.mark.faults
def test_files_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(GOOD)}\r\n{json.dumps(GOOD)}".encode())
    loaded = load_puzzles(path)
    assert (loaded.rows["train"], loaded.rows["val"], loaded.duplicates) == ((Puzzle((3, 5, 2), 13),), (), 1)


@pytest.mark.faults
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.jsonl"
    with pytest.raises(CountdownError, match=r"cannot read `.*jsonl`: No such file or directory"):
        load_puzzles(path)
    path.write_bytes(b"")
    load_puzzles.cache_clear()
    with pytest.raises(CountdownError, match="` has no puzzles"):
        load_puzzles(path)
    load_puzzles.cache_clear()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff")
    with pytest.raises(CountdownError, match="line 2: not UTF-8"):
        load_puzzles(path)


@pytest.mark.faults
def test_a_device_or_a_fifo_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (Path("/dev/zero"), tmp_path / "fifo", tmp_path):
        with pytest.raises(CountdownError, match="is not a regular file"):
            load_puzzles(path)


def test_rows_for_verl_hold_prompt_and_truth(countdown: Command) -> None:
    puzzles = list(enumerate_puzzles(3, "val"))
    row = json.loads(countdown("gen-data", "--split", "val", "--columns", "verl").out.splitlines()[1])
    assert row["prompt"] == prompt(puzzles[1]) and row["extra_info"] == {"split": "val", "index": 1}
    truth = {"numbers": list(puzzles[1].numbers), "target": puzzles[1].target}
    assert row["reward_model"] == {"style": "rule", "ground_truth": truth}
    assert (row["data_source"], row["ability"]) == ("countdown", "math")


def test_a_style_without_prompts_is_refused(countdown: Command) -> None:
    refused = countdown("gen-data", "--split", "val", "--style", "natural")
    assert refused.code == 2 and "hold no prompt" in refused.err and "--columns verl" in refused.err


@pytest.mark.parametrize("style", ["one-shot", "zero-shot"])
def test_tinyzero_reads_the_text_of_the_first_message(countdown: Command, style: Style) -> None:
    rows = countdown("gen-data", "--split", "val", "--columns", "tinyzero", "--style", style).out.splitlines()
    puzzle, row = next(iter(enumerate_puzzles(3, "val"))), json.loads(rows[0])
    (message,) = row["prompt"]
    assert message["role"] == "user" and message["content"].endswith(f"{prompt(puzzle)[-1]['content']}\nAssistant:")
    assert all(turn["content"] in message["content"] for turn in prompt(puzzle, style))
    sequence = message["content"] + "<think>\n...\n</think>\n<answer>2 - 2 + 2</answer>"  # its scorer reads this:
    assert sequence.split("Assistant:", 1)[1].split("\n")[-1] == "<answer>2 - 2 + 2</answer>"


@pytest.mark.parametrize("columns", ["verl", "tinyzero"])
def test_columns_of_other_trainers_need_a_format_that_nests(countdown: Command, tmp_path: Path, columns: str) -> None:
    refused = countdown("gen-data", "--columns", columns, "--out", tmp_path / "val.csv")
    assert refused.code == 2 and "CSV cannot hold the nested columns" in refused.err


@pytest.mark.parametrize("head", [" numbers, target", '"numbers", "target" ', "\ufeffnumbers ,\ttarget"])
def test_white_space_around_the_columns_of_a_csv_file_is_ignored(head: str, tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(f'{head}\n "3 5 2", 13\n')
    assert load_puzzles(path).rows["train"] == (Puzzle((3, 5, 2), 13),)
