"""What a run's folder promises: names, whole files, and errors that say where."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.run.folder import Run, find_run, list_runs, require_space, suggestion


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "runs", "first")
    run.write_config({"seed": 1})
    return run


def save(run: Run, path: Path, text: str) -> None:
    with run.saving(path) as folder:
        (folder / "weights").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["a", "0", "run-1", "qwen2.5_x", "a" * 64])
def test_a_plain_name_makes_a_folder_of_that_name(tmp_path: Path, name: str) -> None:
    run = Run.create(tmp_path / "deep" / "runs", name)
    assert (run.name, run.path) == (name, tmp_path / "deep" / "runs" / name)
    assert run.path.is_dir()


def test_runs_without_a_name_take_the_first_free_number(tmp_path: Path) -> None:
    (tmp_path / "run-2").touch()
    assert [Run.create(tmp_path).name for _ in range(3)] == ["run-1", "run-3", "run-4"]


def test_a_name_that_is_taken_is_refused_with_both_ways_out(run: Run) -> None:
    with pytest.raises(CountdownError, match="run `first` already exists") as caught:
        Run.create(run.path.parent, "first")
    assert caught.value.hint is not None
    assert "--resume" in caught.value.hint
    assert "--overwrite" in caught.value.hint


def test_overwriting_leaves_nothing_of_the_old_run(run: Run) -> None:
    save(run, run.model_path, "old")
    again = Run.create(run.path.parent, "first", overwrite=True)
    assert list(again.path.iterdir()) == []
    assert list(run.path.parent.iterdir()) == [again.path]


@pytest.mark.faults
def test_overwriting_deletes_links_and_not_what_they_point_to(run: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (run.path / "link").symlink_to(tmp_path / "precious")
    Run.create(run.path.parent, "first", overwrite=True)
    assert contents(tmp_path / "precious") == {"file": "kept"}


def other_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("kept")


def link_to_a_run(path: Path) -> None:
    target = Run.create(path.parent.parent / "elsewhere", "x")
    target.write_config({})
    path.symlink_to(target.path)


@pytest.mark.faults
@pytest.mark.parametrize("make", [other_folder, link_to_a_run, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_run_is_never_overwritten(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "x"
    make(path)
    for overwrite in (False, True):
        with pytest.raises(CountdownError, match="is not a run, so it is not overwritten"):
            Run.create(path.parent, "x", overwrite=overwrite)
    assert os.path.lexists(path)
    with pytest.raises(CountdownError) as caught:
        Run.open(path.parent, "x")
    assert "train" not in str(caught.value.hint)  # its name is taken


def test_opening_what_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(CountdownError, match=f"no run `{name}` in") as caught:
            Run.open(tmp_path, name)
        assert caught.value.hint is not None
        assert f"countdown train --run {name}" in caught.value.hint


def test_the_newest_run_is_the_last_to_log_among_those_with_a_model(tmp_path: Path) -> None:
    assert Run.newest(tmp_path / "none") is None
    for number, name in enumerate(["b", "a", "c", "no-model", "no-metrics"]):
        run = Run.create(tmp_path, name)
        run.write_config({})
        if name != "no-model":
            save(run, run.model_path, name)
        if name != "no-metrics":
            run.log({"step": 1})
            os.utime(run.path / "metrics.jsonl", (0, 1000 + number if name != "c" else 0))
    newest = Run.newest(tmp_path)
    assert newest is not None
    assert newest.name == "a"


def test_a_run_is_found_by_its_name_or_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("runs")
    for name in ("first", "runs/first", "runs/first/", "./runs/first", str(run.path)):
        assert Run.open(root, name).name == "first"
        found = find_run(root, name)
        assert found is not None and found.path.resolve() == run.path
        with pytest.raises(CountdownError, match="run `first` already exists"):
            Run.check(root, name)
    assert find_run(Path("elsewhere"), "runs/first") is None  # which may be a model: those have a config.json too
    run.write_origin({})
    assert find_run(Path("elsewhere"), "runs/first") is not None
    for name in (
        "second",
        "runs/second",
        "",
        ".",
        "/",
        "a\0",
        "runs/a\0",
        "x" * 300,
        "runs/" + "x" * 300,
        "owner/name",
    ):
        assert find_run(root, name) is None
    assert suggestion(root, "frist") == "did you mean `first`?"
    assert suggestion(root, "qwen") is None


@pytest.mark.faults
@pytest.mark.parametrize("name", ["builtin", "same", "auto", "none", "qwen2.5-1.5b"])
def test_a_word_of_the_settings_names_no_run(tmp_path: Path, name: str) -> None:
    for overwrite in (False, True):
        with pytest.raises(CountdownError, match="settings use that word"):
            Run.create(tmp_path, name, overwrite=overwrite)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "builtin").mkdir()
    (tmp_path / "builtin" / "config.json").write_text("{}")
    assert find_run(tmp_path, "builtin") is None


@pytest.mark.faults
def test_links_are_not_runs_and_no_part_of_one(run: Run, tmp_path: Path) -> None:
    root = run.path.parent
    (root / "link").symlink_to(run.path)
    run.write_origin({})
    assert [found.name for found in list_runs(root)] == ["first"]
    assert find_run(root, "link") is None and find_run(tmp_path, str(root / "link")) is None
    with pytest.raises(CountdownError, match="link` is a symbolic link"):
        Run.open(root, "link")
    for name in ("metrics.jsonl", "model", "checkpoints", ".lock"):
        (run.path / name).symlink_to(tmp_path / "precious")
        with pytest.raises(CountdownError, match=f"{name}` is a symbolic link"):
            Run.open(root, "first")
        (run.path / name).unlink()


@pytest.mark.faults
def test_a_lock_that_is_no_file_of_its_own_is_refused(run: Run, tmp_path: Path) -> None:
    lock, precious = run.path / ".lock", tmp_path / "precious"
    precious.write_text("kept")
    lock.symlink_to(precious)
    with pytest.raises(CountdownError, match="cannot write"), run.locked():
        pass
    assert precious.read_text() == "kept"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(CountdownError, match="lock` is not a regular file"), run.locked():
        pass


@pytest.mark.faults
def test_a_failed_start_leaves_nothing_and_one_cut_off_can_be_repeated(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "first")
    with pytest.raises(OSError, match="full"), run.locked(), run.starting():
        run.write_config({})
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []
    with Run.create(tmp_path, "first").locked():
        pass  # killed here: the folder holds its lock alone
    assert Run.create(tmp_path, "first").path.is_dir()


def test_only_runs_are_listed(run: Run) -> None:
    root = run.path.parent
    Run.create(root, "not-begun")
    (root / ".first.old").mkdir()
    (root / ".first.old" / "config.json").write_text("{}")
    (root / "notes.txt").touch()
    (root / "second" / "config.json").mkdir(parents=True)
    assert [found.name for found in list_runs(root)] == ["first"]
    assert list_runs(root / "none") == []


def test_json_files_come_back_as_they_were_written(run: Run) -> None:
    assert run.read_summary() is None
    run.write_summary({"base": 0.25, "note": "\ud800 é"})
    for step, torch in [(0, "1"), (0, "2"), (7, "3"), (9, "4"), (7, "5")]:
        run.write_environment({"torch": torch}, step=step)
    assert run.read_summary() == {"base": 0.25, "note": "\ud800 é"}
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment == {"from step 0": {"torch": "2"}, "from step 7": {"torch": "5"}}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (None, "No such file or directory"),
    ],
)
def test_a_damaged_config_is_named(run: Run, content: bytes | None, complaint: str) -> None:
    path = run.path / "config.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CountdownError, match=complaint) as caught:
        run.read_config()
    assert str(path) in caught.value.message


@pytest.mark.faults
def test_a_file_of_other_content_is_named(run: Run) -> None:
    for content in ('{"step": {}}', '{"from step 0": 3}', '{"from step x": {}}'):
        (run.path / "environment.json").write_text(content)
        with pytest.raises(CountdownError, match=r"environment\.json` is not the environment of a step"):
            run.write_environment({}, step=1)
    (run.path / "tracker.json").write_text('{"name": 3}')
    with pytest.raises(CountdownError, match=r"tracker\.json` has no `id`"):
        run.tracker_id()


def test_metrics_come_back_in_order_with_their_types_and_are_finite(run: Run) -> None:
    assert run.metrics() == []
    lines = [{"step": 0, "val_accuracy": 0.25}, {"step": 1, "loss": -1e-9, "time/total": 2}]
    for line in lines:
        run.log(line)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.log({"step": 2, "loss": float("nan")})
    assert run.metrics() == lines
    assert [type(line["step"]) for line in run.metrics()] == [int, int]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "line 2 of `{}` is not valid JSON"),
        (b"[" * 100_000, "line 2 of `{}` is not valid JSON"),
        (b'{"loss": 1}', "line 2 of `{}` is not an object with a `step`"),
        (b'{"step": 2, "loss": "1"}', "line 2 of `{}` has a `loss` that is not a number"),
        (b'{"step": 2, "loss": true}', "line 2 of `{}` has a `loss` that is not a number"),
        (b'{"step": 2, "loss": NaN}', "line 2 of `{}` has a `loss` that is not a finite number"),
        (b'{"step": 2, "val_accuracy": 1e308}', "line 2 of `{}` has a `val_accuracy` that is not a share from 0 to 1"),
        (b'{"step": 2, "time/total": 1e308}', "line 2 of `{}` has a `time/total` that is not a number of seconds"),
        (b'{"step": 1' + b"0" * 16 + b"}", "line 2 of `{}` is not an object with a `step`"),
    ],
)
def test_a_wrong_line_of_metrics_is_numbered(run: Run, line: bytes, complaint: str) -> None:
    path = run.path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(CountdownError) as caught:
        run.metrics()
    assert caught.value.message == complaint.replace("{}", str(path))


@pytest.mark.faults
def test_a_last_line_that_was_cut_off_is_left_out(run: Run) -> None:
    run.log({"step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run.go_back_to(1)
    run.log({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def sampled(step: int, completion: str = "") -> dict[str, object]:
    facts: dict[str, object] = {"reward": 0.1, "reason": "no_answer", "answer": None, "completion": completion}
    return {"step": step, "numbers": [3, 5, 2], "target": 13, **facts}


def test_a_run_that_goes_on_forgets_later_steps(run: Run) -> None:
    for step in range(4):
        run.log({"step": step})
        run.log_samples(sampled(step, f"\u2028{step}{sample}") for sample in range(2))
    run.go_back_to(1)
    assert run.metrics() == [{"step": 0}, {"step": 1}]
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["completion"]) for line in samples] == [
        (step, f"\u2028{step}{sample}") for step in range(2) for sample in range(2)
    ]


def evaluation(step: int, cell: str, solved: str) -> dict[str, object]:
    accuracy = solved.count("1") / len(solved)
    figures = {"accuracy": accuracy, "interval": [0.0, 1.0], "lenient_accuracy": accuracy, "format_rate": 1.0}
    found = {"step": step, "cell": cell, "count": len(solved), "solved": solved, "mean_length": 9.5, "examples": []}
    return {**found, **figures, "reasons": {"correct": solved.count("1")}}


def test_evaluations_are_read_by_cell_and_step_the_last_of_each(run: Run) -> None:
    run.go_back_to(0)  # makes no files
    assert list(run.path.iterdir()) == [run.config_path]
    assert run.evaluations() == {}
    for step, solved in ((0, "010"), (5, "011"), (5, "111")):
        run.log_evaluations([evaluation(step, "val 3 one-shot", solved), evaluation(step, "val 4 natural", "000")])
    found = run.evaluations()
    assert list(found) == ["val 3 one-shot", "val 4 natural"]
    assert {step: one.solved for step, one in found["val 3 one-shot"].items()} == {0: "010", 5: "111"}


def test_a_run_that_goes_on_forgets_what_its_pending_step_will_log_again(run: Run) -> None:
    for step in range(3):
        run.log({"step": step})
        run.log_samples([sampled(step)])
        run.log_evaluations([evaluation(step, "val 3 one-shot", "1")])
    run.go_back_to(1, pending=True)
    assert run.metrics() == [{"step": 0}]
    assert list(run.evaluations()["val 3 one-shot"]) == [0]
    assert len((run.path / "samples.jsonl").read_text().splitlines()) == 2


def test_saving_replaces_a_folder_as_a_whole_at_the_end(run: Run) -> None:
    save(run, run.model_path, "old")
    with run.saving(run.model_path) as folder:
        (folder / "shard").mkdir()
        (folder / "shard" / "weights").write_text("new")
        assert contents(run.model_path) == {"weights": "old"}
    assert contents(run.model_path) == {"shard/weights": "new"}
    assert {path.name for path in run.path.iterdir()} == {"config.json", "model"}


@pytest.mark.faults
@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_saving_that_fails_keeps_what_was_there(run: Run, failure: type[BaseException]) -> None:
    save(run, run.model_path, "old")
    with pytest.raises(failure), run.saving(run.model_path) as folder:
        (folder / "weights").write_text("half")
        raise failure
    assert contents(run.model_path) == {"weights": "old"}
    assert {path.name for path in run.path.iterdir()} == {"config.json", "model"}


@pytest.mark.faults
def test_saving_that_fails_between_its_two_renames_puts_the_old_folder_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, run.model_path, "old")
    rename = Path.rename

    def fail_to_put_in_place(path: Path, target: Path) -> Path:
        if path.name == ".model.tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_to_put_in_place)
    with pytest.raises(KeyboardInterrupt):
        save(run, run.model_path, "new")
    assert contents(run.model_path) == {"weights": "old"}


@pytest.mark.faults
def test_saving_clears_up_after_a_process_that_was_killed(run: Run) -> None:
    checkpoint = run.checkpoint_path(50)
    staged = checkpoint.with_name(".step-50.tmp")
    staged.mkdir(parents=True)
    (staged / "half").touch()
    assert run.checkpoints() == []
    save(run, checkpoint, "whole")
    assert contents(checkpoint.parent) == {"step-50/weights": "whole"}


def checkpoint(run: Run, *steps: int) -> None:
    for step in steps:
        with run.saving(run.checkpoint_path(step), {"step": step}) as folder:
            (folder / "weights").write_text(str(step))


def test_checkpoints_are_in_order_of_steps_and_the_last_ones_are_kept(run: Run) -> None:
    assert run.checkpoints() == []
    checkpoint(run, 100, 50, 1000)
    (run.path / "checkpoints" / "step-x").mkdir()
    assert [step for step, _ in run.checkpoints()] == [50, 100, 1000]
    assert (run.checkpoints()[0][1] / "weights").read_text() == "50"
    run.prune_checkpoints(3)
    assert len(run.checkpoints()) == 3
    run.prune_checkpoints(1, also=50)
    assert [step for step, _ in run.checkpoints()] == [50, 1000]
    run.prune_checkpoints(0)
    assert {path.name for path in (run.path / "checkpoints").iterdir()} == {"step-x"}


@pytest.mark.faults
def test_a_damaged_checkpoint_does_not_count_among_those_kept(run: Run) -> None:
    checkpoint(run, 1, 2, 3, 4, 5)
    (run.checkpoint_path(4) / "weights").write_text("longer than it was")
    run.prune_checkpoints(2)
    assert [step for step, _ in run.checkpoints()] == [3, 4, 5]


@pytest.mark.faults
def test_a_checkpoint_that_cannot_be_removed_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(run, 1, 2, 3)

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError

    monkeypatch.setattr(Path, "rename", refuse)
    run.prune_checkpoints(2)
    assert [step for step, _ in run.checkpoints()] == [1, 2, 3]


@pytest.mark.faults
def test_leftovers_of_a_failed_removal_do_not_count(run: Run) -> None:
    checkpoint(run, 1, 2)
    run.checkpoint_path(1).rename(run.path / "checkpoints" / ".step-1.old")
    assert [step for step, _ in run.checkpoints()] == [2]


@pytest.mark.faults
def test_too_little_space_is_one_sentence(run: Run) -> None:
    require_space(run.path / "not" / "there", 1)
    with pytest.raises(CountdownError, match="MB free, and a checkpoint needs") as caught:
        require_space(run.path, 10**18)
    assert caught.value.exit_code == 1


@pytest.mark.faults
def test_damaged_lines_are_moved_aside_when_a_run_is_resumed(run: Run) -> None:
    for step in (1, 2):
        run.log({"step": step})
        run.log_samples([sampled(step)])
        run.log_evaluations([evaluation(step, "val 3 one-shot", "1")])
        for name in ("metrics", "samples", "evaluations"):
            with (run.path / f"{name}.jsonl").open("ab") as file:
                file.write(b'\x00\xff garbage\n{"step": "1"}\n')
    said = run.go_back_to(1)
    assert [re.sub(r"`/.*/", "`", text) for text in said] == [
        f"moved 4 damaged lines of `{name}.jsonl` to `{name}.jsonl.damaged`"
        for name in ("metrics", "evaluations", "samples")
    ]
    assert run.metrics() == [{"step": 1}]
    assert len((run.path / "samples.jsonl").read_text().splitlines()) == 1
    assert list(run.evaluations()["val 3 one-shot"]) == [1]
    assert (run.path / "metrics.jsonl.damaged").read_bytes() == b'\x00\xff garbage\n{"step": "1"}\n' * 2
    assert run.go_back_to(1) == []


@pytest.mark.faults
@pytest.mark.parametrize("name", ["metrics", "evaluations"])
def test_a_log_that_is_gone_is_said_when_a_run_is_resumed(run: Run, name: str) -> None:
    run.log({"step": 1})
    run.log_evaluations([evaluation(1, "val 3 one-shot", "1")])
    (run.path / f"{name}.jsonl").unlink()
    assert [sentence.partition(f"{name}.jsonl`")[2] for sentence in run.go_back_to(1)] == [
        " is gone: the steps up to 1 are missing in it"
    ]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["model", "checkpoints"])
def test_a_file_in_place_of_a_folder_is_refused_before_logs_are_cut(run: Run, name: str) -> None:
    (run.path / name).write_text("kept")
    with pytest.raises(CountdownError, match=f"{name}` is not a folder"):
        Run.open(run.path.parent, "first")
