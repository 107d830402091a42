"""Trackers: what each one's own reader finds in it, and that none of them can end a training."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Command

from grpo_cli.core.rl import trackers

TRAIN = ["train", "--run", "first", *SMALL]


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs/first/metrics.jsonl").read_text("utf-8").splitlines()]


def tensorboard_scalars(folder: Path) -> Mapping[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs/first/tensorboard"))
    events.Reload()
    names = events.Tags()
    assert "samples/text_summary" in names["tensors"]
    shown = str(events.summary_metadata)
    assert "train.learning_rate" in shown
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names["scalars"]}
    return found | {"hparams": [(0, 0.0)] * ("hparams" in str(events.summary_metadata))}


def test_tensorboard_reads_back_every_logged_number_also_after_a_resume(
    countdown: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    """Step 2 is logged in the first process, dropped with its checkpoint, and logged again by the second."""
    pytest.importorskip("tensorboard")
    assert countdown(*TRAIN, "--model", tiny_folder, "--tracker", "tensorboard").code == 0
    resumed = ["train", "--run", "first", "--resume", "--step", "1", "--num-iterations", "3"]
    assert countdown(*resumed).code == 0
    lines = logged(tmp_path)
    scalars = tensorboard_scalars(tmp_path)
    for ours, theirs in [
        ("reward", "train/reward"),
        ("completion_length", "train/completions/mean_length"),
        ("time/rollout", "time/rollout"),
        ("val_accuracy", "eval/accuracy"),
        ("dev_accuracy", "eval/dev_accuracy"),
    ]:
        expected = [(int(line["step"]), line[ours]) for line in lines if ours in line]
        assert dict(scalars[theirs]) == pytest.approx(dict(expected))
        assert len(scalars[theirs]) == len(expected)
    assert scalars["hparams"]
    assert len({step for step, _ in scalars["train/loss"]}) == 3


DRIVE = """
import json, sys
from pathlib import Path
from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.rl.observer import Validated
from grpo_cli.core.rl.trackers import Tracked
from grpo_cli.core.run.folder import Run

settings = resolve(flags={"train.tracker": sys.argv[1], "runs": "runs"}, has_cuda=lambda: False).settings
sample = {"numbers": [3, 5, 2], "target": 13, "completion": "5|2\\n", "reward": 0.1, "reason": "wrong_value"}
run = Run.create(Path("runs"), "first")
for start in (0, 2):
    observer = Tracked(sys.argv[1], settings, sys.exit)
    observer.begin(run, start)
    observer.evaluated(Validated(0, 0.25, 4, (0.0, 0.5), None, 0.125))
    for step in (start + 1, start + 2):
        observer.step({"step": step, "reward": step / 8, "time/total": 2.0}, {"step": step, **sample})
    observer.evaluated(Validated(start + 2, 0.5, 4, (0.0, 0.5), 0.75, 0.25))
    observer.close()
"""
STEPS = {step: step / 8 for step in (1, 2, 3, 4)}


def drive(tracker: str, folder: Path) -> None:
    """Track a run of four steps that is resumed after two, in a process of its own: trackers keep services."""
    environ = {**os.environ, "TRACKIO_DIR": str(folder / "store"), "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", DRIVE, tracker]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_trackio_keeps_one_resumed_run_with_config_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    drive("trackio", tmp_path)
    with closing(sqlite3.connect(tmp_path / "store" / "countdown.db")) as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        ((config,),) = store.execute("SELECT DISTINCT config FROM configs").fetchall()
    logs = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert len({name for name, _, _ in rows}) == 1 and rows[0][0].startswith("first-")
    assert {step: found["train/reward"] for step, found in logs if "train/reward" in found} == STEPS
    accuracies = [(step, found["eval/accuracy"]) for step, found in logs if "eval/accuracy" in found]
    assert accuracies == [(0, 0.25), (2, 0.5), (4, 0.5)]
    assert json.loads(config)["train.batch_size"] == 16
    tables = [found["samples"]["_value"] for _, found in logs if "samples" in found]
    assert [[row["step"] for row in table] for table in tables] == [[1, 2], [3, 4]]
    assert tables[0][0]["problem"] == "[3, 5, 2] -> 13"


def test_wandb_writes_offline_runs_of_one_identity(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    drive("wandb", tmp_path)
    paths = sorted((tmp_path / "runs/first/wandb").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1  # `wandb sync` joins them
    history = [row for path in paths for row in wandb_history(path)]
    assert {int(row["step"]): row["train/reward"] for row in history if "train/reward" in row} == STEPS
    assert sum("eval/suite_mean" in row for row in history) == 2
    tables = sorted((tmp_path / "runs/first/wandb").rglob("*.table.json"))
    assert json.loads(tables[0].read_text("utf-8"))["columns"] == [*trackers.COLUMNS]


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The logged rows of an offline run: protocol buffers in LevelDB's log format, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, payload, rows = path.read_bytes(), 7, b"", []
    while len(data) - at > 7:
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, kind = struct.unpack_from("<HB", data, at + 4)
        payload, at = payload + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, payload = Record.FromString(payload), b""
            items = record.history.item
            rows.append({(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.parametrize("fails", ["__init__", "scalars", "samples", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_warning(
    fails: str, countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    pytest.importorskip("tensorboard")
    monkeypatch.setattr(trackers.TensorBoard, fails, broken)
    result = countdown(*TRAIN, "--model", tiny_folder, "--tracker", "tensorboard", "--num-iterations", "1")
    assert result.code == 0
    assert result.err.count("tensorboard failed and is off for the rest of this run: no space left") == 1


def test_a_missing_tracker_is_refused_before_any_model_loads(
    countdown: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    result = countdown("train", "--tracker", "wandb")
    assert result.code == 2
    assert "countdown-grpo[wandb]" in result.err
