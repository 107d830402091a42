"""What happens to a run that is killed, damaged, crowded out or asked to go on as something else."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo_cli.core import config
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.policy import Policy
from grpo_cli.core.run import Run
from grpo_cli.core.settings import Settings
from grpo_cli.core.state import Training, build_optimizer, choose_checkpoint

pytestmark = pytest.mark.faults

Damage = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def default_settings(**flags: object) -> Settings:
    given = {"train.keep_last": 3, **{key.replace("__", "."): value for key, value in flags.items()}}
    return config.resolve(flags=given, has_cuda=lambda: False).settings


def training(policy: Policy, step: int) -> Training:
    return Training(policy, build_optimizer(policy, name="adamw", weight_decay=0.0), step=step)


@pytest.fixture
def run(tiny_policy: Policy, tmp_path: Path) -> Run:
    """A run with checkpoints of steps 1 to 3."""
    run = Run.create(tmp_path, "first")
    run.write_config({})
    for step in (1, 2, 3):
        training(tiny_policy, step).save(run, default_settings())
    return run


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
def test_a_damaged_checkpoint_is_skipped_with_its_reason(run: Run, tmp_path: Path, damage: Damage) -> None:
    files = sorted(path.relative_to(run.path) for path in run.checkpoint_path(3).rglob("*") if path.is_file())
    assert len(files) > 5
    for file in files:
        copy = Run(tmp_path / "copy")
        shutil.copytree(run.path, copy.path)
        damage(copy.path / file)
        told: list[str] = []
        assert choose_checkpoint(copy, default_settings(), None, told.append)[0] == 2
        assert len(told) == 1 and file.name in told[0] and "step 3" in told[0]
        with pytest.raises(CountdownError, match="the checkpoint of step 3 is damaged") as caught:
            choose_checkpoint(copy, default_settings(), 3, told.append)
        assert caught.value.exit_code == 1 and len(told) == 1
        shutil.rmtree(copy.path)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"{}",
        b"[" * 100_000,
        b'{"format": 2, "step": 3, "files": {}}',
        b'{"format": 1, "step": 2, "files": {}}',
        b'{"format": 1, "step": 3, "files": []}',
        b'{"format": 1, "step": 3, "files": {}}',
        b'{"format": 1, "step": 3, "files": {"a": 1}}',
        b'{"format": 1, "step": 3, "files": {"state.pt": {}}}',
    ],
)
def test_a_forged_manifest_is_skipped(run: Run, content: bytes) -> None:
    (run.checkpoint_path(3) / "manifest.json").write_bytes(content)
    told: list[str] = []
    assert choose_checkpoint(run, default_settings(), None, told.append)[0] == 2
    assert len(told) == 1


def test_when_no_checkpoint_is_whole_nothing_is_touched(run: Run) -> None:
    for step in (1, 2, 3):
        truncate(run.checkpoint_path(step) / "state.pt")
    before, told = everything(run.path), list[str]()
    with pytest.raises(CountdownError, match="no checkpoint of run `first` is whole") as caught:
        choose_checkpoint(run, default_settings(), None, told.append)
    assert caught.value.exit_code == 1
    assert len(told) == 3
    assert everything(run.path) == before


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(run: Run) -> None:
    assert choose_checkpoint(run, default_settings(), 2, print)[0] == 2
    with pytest.raises(CountdownError, match="no checkpoint of step 7") as caught:
        choose_checkpoint(run, default_settings(), 7, print)
    assert caught.value.hint == "choose one of: 1, 2, 3"


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    assert choose_checkpoint(Run.create(tmp_path, "begun"), default_settings(), None, print) == (0, None)


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoints_before(run: Run, tiny_policy: Policy) -> None:
    before = everything(run.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CountdownError, match="cannot save step 4") as caught:
            training(tiny_policy, 4).save(run, default_settings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert caught.value.hint is not None and "checkpoints: 1, 2, 3" in caught.value.hint
    assert everything(run.path) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.optimizer", "adamw8bit"),
        ("train.learning_rate", 0.5),
        ("train.seed", 9),
        ("train.batch_size", 3),
        ("model.model", "other"),
        ("task.numbers", 4),
        ("task.style", "natural"),
        ("loss.beta", 0.5),
    ],
)
def test_a_run_that_goes_on_stays_what_it_is(tmp_path: Path, key: str, value: object) -> None:
    saved = config.resolve(has_cuda=lambda: False).settings.model_dump()
    with pytest.raises(CountdownError, match=f"cannot change {key} from .* to {value}"):
        config.go_on(saved, tmp_path / "config.json", flags={key: value})


def test_a_run_that_goes_on_may_be_longer_and_log_otherwise(tmp_path: Path) -> None:
    saved = config.resolve(has_cuda=lambda: False).settings.model_dump()
    flags = {"train.num_iterations": 7, "train.eval_every": 3, "train.save_every": 2, "train.keep_last": 5}
    found = config.go_on(saved, tmp_path / "config.json", flags=flags).settings.train
    assert (found.num_iterations, found.eval_every, found.save_every, found.keep_last) == (7, 3, 2, 5)


STEPS = 120


def command(tiny_folder: Path, root: Path, name: str, *more: str) -> list[str]:
    line = [sys.executable, "-m", "grpo_cli", "train", "--runs", str(root), "--run", name, *more]
    if "--resume" in more:
        return line
    settings = {"num-iterations": STEPS, "eval-every": 7, "save-every": 1, "keep-last": 3, "eval-puzzles": 4}
    settings |= {"batch-size": 2, "num-generations": 2, "max-new-tokens": 8}
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return [*line, "--model", str(tiny_folder), "--preset", "builtin", "--precision", "float32", *options]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(*arguments: str) -> subprocess.Popen[str]:
        line = command(tiny_folder, tmp_path, *arguments)
        return subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)

    shown, _ = (undisturbed := begin("whole")).communicate()
    assert undisturbed.returncode == 0, shown
    rng, folder = random.Random(0), tmp_path / "killed"
    kills, reached = 0, list[int]()
    process = begin("killed")

    def holds_the_run() -> bool:
        return (folder / ".lock").exists() and (folder / ".lock").read_text() == str(process.pid)

    def newest() -> int:
        return max((step for step, _ in Run(folder).checkpoints()), default=0)

    def goes_on() -> bool:
        return holds_the_run() and newest() > reached[-1]

    while kills < 20:
        ready = goes_on if kills % 4 else holds_the_run  # one in four dies while it starts
        while not ready() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.4))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        reached.append(newest())
        process = begin("killed", "--resume")
    shown, _ = process.communicate()
    assert process.returncode == 0, shown
    assert kills == 20, reached
    assert len(set(reached)) > 5, reached
    whole, killed = (Run(tmp_path / name) for name in ("whole", "killed"))
    final = [(found.checkpoint_path(STEPS) / "model" / "model.safetensors").read_bytes() for found in (whole, killed)]
    assert final[0] == final[1]
    states = [torch.load(found.checkpoint_path(STEPS) / "state.pt", weights_only=True) for found in (whole, killed)]
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith(("time", "tokens"))} for line in found.metrics()]
        for found in (whole, killed)
    ]
    assert timeless[0] == timeless[1]
