"""Whole groups of a run: one gzip member per step, and nothing lost beside a damaged one."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import SMALL, Command

from grpo_cli.core.run.folder import Run
from grpo_cli.core.run.groups import GroupLog


def group(step: int, prompt: int = 0) -> dict[str, object]:
    return {"step": step, "prompt_index": prompt, "completions": [{"completion": f"try {step}\n", "reward": 1.0}]}


@pytest.fixture
def log(tmp_path: Path) -> GroupLog:
    log = GroupLog(tmp_path / "groups.jsonl.gz")
    for step in (1, 2, 3):
        log.append([group(step, 0), group(step, 1)])
    return log


def test_the_file_is_gzip_of_json_lines(log: GroupLog) -> None:
    lines = gzip.decompress(log.path.read_bytes()).splitlines()
    assert [json.loads(line) for line in lines] == list(log.read())
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3]


def test_the_groups_of_a_step_come_back(log: GroupLog) -> None:
    assert list(log.read(2)) == [group(2, 0), group(2, 1)]
    assert list(log.read(9)) == []


@pytest.mark.parametrize("lost", [1, 9, 40])
def test_a_write_that_was_cut_off_loses_its_step_alone(log: GroupLog, lost: int) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-lost])
    assert {one["step"] for one in log.read()} == {1, 2}
    copy = GroupLog(log.path.with_name("copy.jsonl.gz"))
    copy.path.write_bytes(log.path.read_bytes())
    assert copy.cut(9) == 0  # no damage: it is dropped, as a line of other logs is
    log.append([group(3)])  # without a resume between
    assert {one["step"] for one in log.read()} == {1, 2, 3}


def test_a_damaged_member_is_moved_aside_and_the_others_stay(log: GroupLog) -> None:
    content = bytearray(log.path.read_bytes())
    second = content.find(b"\x1f\x8b\x08", 1)
    content[second + 25] ^= 0xFF
    log.path.write_bytes(bytes(content))
    assert {one["step"] for one in log.read()} == {1, 3}
    assert log.cut(3) == 1
    assert log.path.with_name("groups.jsonl.gz.damaged").stat().st_size > 0
    assert {one["step"] for one in log.read()} == {1, 3}


@pytest.mark.parametrize("last, kept", [(0, set()), (2, {1, 2}), (9, {1, 2, 3})])
def test_a_resumed_run_cuts_its_groups_back(log: GroupLog, last: int, kept: set[int]) -> None:
    assert not any("damaged" in sentence for sentence in Run(log.path.parent).go_back_to(last))
    assert {one["step"] for one in log.read()} == kept


def test_a_run_keeps_every_completion_of_its_groups(finished_run: Path) -> None:
    run = Run(finished_run)
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    for step, metrics in enumerate(run.metrics()[1:], 1):
        groups = run.groups(step)
        assert [one["prompt_index"] for one in groups] == [0, 1]
        rows = [row for one in groups for row in one["completions"]]
        assert [row["sample_index"] for row in rows] == [0, 1, 0, 1]
        assert sum(row["reward"] for row in rows) / 4 == pytest.approx(metrics["reward"])
        assert sum(row["length"] for row in rows) / 4 == metrics["completion_length"]
        assert sum(row["truncated"] for row in rows) / 4 == metrics["truncated"]
        shown = [sample["completion"] for sample in samples if sample["step"] == step]
        assert [one["completions"][step % 2]["completion"] for one in groups] == shown


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_keeps_as_many_groups_as_it_is_asked_to(countdown: Command, tiny_folder: Path, count: int) -> None:
    assert countdown("train", "--model", tiny_folder, *SMALL, "--run", "one", "--keep-groups", count).code == 0
    run = Run(Path("runs") / "one")
    assert [len(run.groups(step)) for step in (1, 2)] == [count, count]
