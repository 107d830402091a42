"""What happens to a run that is killed, damaged, crowded out or asked to go on as something else."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import count
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from conftest import SMALL, Command, SetPuzzles, configure, run_here, save_tiny_model, state_of, timeless
from forked import Forked
from safetensors.torch import load_file

from grpo_cli.core.config import resolve as config
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rl.state import choose_checkpoint
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.data import puzzle_set

pytestmark = pytest.mark.faults

# Commands are imported when they are called; here before a test patches what they import.
for _module in ("core.rl.build", "core.evals.compare", "ui.eval_tables", "ui.live", "ui.report", "ui.figures"):
    import_module(f"grpo_cli.{_module}")
import_module("multiprocessing.popen_fork")  # `read_only` is another user, who may have no right to import

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


@pytest.fixture(scope="module")
def three_checkpoints(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run.create(tmp_path_factory.mktemp("saved"), "first")
    run.write_config({})
    policy = load(str(tiny_folder), device="cpu", precision="float32")
    for step in (1, 2, 3):
        state_of(policy, step=step).save(run, default_settings())
    return run.path


@pytest.fixture
def run(three_checkpoints: Path, tmp_path: Path) -> Run:
    """A run with checkpoints of steps 1 to 3."""
    return Run(Path(shutil.copytree(three_checkpoints, tmp_path / "first")))


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


def forged(manifest: dict[str, object], **changes: object) -> bytes:
    """A manifest whose own hash is right."""
    content = {**manifest, **changes}
    content.pop("sha256")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}).encode()


FORGERIES: list[tuple[Callable[[dict[str, object]], bytes], str]] = [
    (lambda _: b"[]", "is not a JSON object"),
    (lambda _: b"{", "is not valid JSON"),
    (lambda _: b"[" * 100_000, "is not valid JSON"),
    (lambda _: b"{}", "is not of step 3"),
    (lambda manifest: forged(manifest, format=9), "in format"),
    (lambda manifest: forged(manifest, step=2), "is not of step 3"),
    (lambda manifest: forged(manifest, files=[]), "is not of step 3"),
    (lambda manifest: json.dumps({**manifest, "config": ""}).encode(), "manifest.json` is not what was saved"),
    (lambda manifest: forged(manifest, files={}), "is not what was saved"),
    (lambda manifest: forged(manifest, files={"a": 1}), "`{}/a` is missing"),
    (lambda manifest: forged(manifest, files={"state.pt": {}}), "is not what was saved"),
]


@pytest.mark.parametrize(("forge", "said"), FORGERIES)
def test_a_forged_manifest_is_skipped(run: Run, forge: Callable[[dict[str, object]], bytes], said: str) -> None:
    folder = run.checkpoint_path(3)
    assert forged(run.manifest(3)) == json.dumps(run.manifest(3)).encode()
    (folder / "manifest.json").write_bytes(forge(run.manifest(3)))
    notes: list[str] = []
    assert choose_checkpoint(run, default_settings(), None, notes.append)[0] == 2
    assert len(notes) == 1 and said.replace("{}", str(folder)) in notes[0]


def test_when_no_checkpoint_is_whole_nothing_is_touched(run: Run) -> None:
    for step in (1, 2, 3):
        truncate(run.checkpoint_path(step) / "state.pt")
    before, told = everything(run.path), list[str]()
    with pytest.raises(CountdownError, match="run `first` has no intact checkpoint") as caught:
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


@pytest.mark.parametrize("best", [False, True])
def test_a_disk_that_fills_up_while_saving_leaves_what_was_there(run: Run, tiny_policy: Policy, best: bool) -> None:
    state_of(tiny_policy, step=3).save_best(run)
    before, filling = everything(run.path), state_of(tiny_policy, step=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CountdownError, match="cannot save step 4") as caught:
            filling.save_best(run) if best else filling.save(run, default_settings())
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
        config.resume_settings(saved, tmp_path / "config.json", flags={key: value})


# Places that cannot be written


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter, as `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def read_only(open_folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a finished run in it, to be entered and read only; no model can be loaded."""
    shutil.copytree(tiny_folder, open_folder / "model")
    run = Run.create(open_folder / "runs", "first")
    run.write_config(default_settings(model__model=str(open_folder / "model")).model_dump())
    run.log({"step": 0, "reward": 0.5})
    shutil.copytree(tiny_folder, run.model_path)
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr("grpo_cli.core.rollout.selfcheck.load", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.chdir(open_folder)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    yield open_folder
    os.seteuid(user)
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(0o755)


BAD_PLACES = [
    (["train", "--runs", "{}/new"], "cannot create a run in `{}/new`: `{}` cannot be written"),
    (["train", "--runs", "{}/runs", "--run", "second"], "cannot create a run in `{}/runs`"),
    (["train", "--runs", "{}/runs", "--run", "first", "--overwrite"], "cannot create a run in `{}/runs`"),
    (["train", "--runs", "{}/runs", "--run", "first", "--resume"], "cannot write `{}/runs/first`: Permission denied"),
    (["eval", "first", "--runs", "{}/runs", "--out", "{}/all.jsonl"], "`{}/all.jsonl` cannot be written"),
    (["eval", "first", "--runs", "{}/runs", "--out", "{}/model/config.json", "--overwrite"], "cannot be written"),
    (["plot", "first", "--runs", "{}/runs"], "`{}/runs/first/training_curve.png` cannot be written"),
    (["gen-data", "--out", "{}/val.jsonl"], "`{}/val.jsonl` cannot be written"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_PLACES)
def test_what_cannot_be_written_is_told_before_any_work(
    countdown: Command, read_only: Path, arguments: list[str], said: str
) -> None:
    before = everything(read_only)
    found = countdown(*[argument.format(read_only) for argument in arguments])
    assert (found.code, found.out) == (2, ""), found.err
    assert said.replace("{}", str(read_only)) in found.err
    assert everything(read_only) == before


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "said"),
    [
        ("runs", ["train", "--run", "builtin-2"], 2, "`runs` cannot be written"),
        ("runs/first/metrics.jsonl", ["runs"], 0, "cannot read `runs/first/metrics.jsonl`: Permission denied"),
        ("model/config.json", ["train", "--model", "./model", "--dry-run", "--runs", "/tmp"], 2, "cannot be read"),
        ("task.py", ["train", "--task", "task.py", "--runs", "/tmp"], 2, "`task.py` cannot be run: PermissionError"),
    ],
)
def test_what_cannot_be_read_is_named(
    countdown: Command, read_only: Path, closed: str, arguments: list[str], code: int, said: str
) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    (read_only / "task.py").touch()
    (read_only / closed).chmod(0)
    os.seteuid(user)
    found = countdown(*arguments)
    assert found.code == code and said in " ".join((found.out + found.err).split()), found.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--runs", "file"], "cannot create a run in `file`: `file` is not a folder"),
        (["train", "--runs", "file/runs"], "cannot create a run in `file/runs`: `"),
        (["train", "--config", "file/config.toml"], "cannot read `file/config.toml`: Not a directory"),
        (["eval", "builtin", "--out", "file/x"], "`file` is not a folder"),
        (["eval", "builtin", "--out", "missing/x"], "`missing` is not a folder"),
        (["eval", "builtin", "--out", "."], "`.` is a folder"),
        (["eval", "builtin", "--out", "all.csv"], "would not be a file of the format"),
        (["plot", "metrics.jsonl", "--out", "file"], "`file` is not a folder"),
        (["plot", "metrics.jsonl", "--out", "missing"], "`missing` is not a folder"),
        (["gen-data", "--out", "file/x"], "`file` is not a folder"),
        (["gen-data", "--out", ".", "--overwrite"], "`.` is a folder"),
        (["solve", "2 4 6 = 12", "--model", "file"], "no model at `file`"),
    ],
)
def test_a_file_where_a_folder_should_be_is_named(
    countdown: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("grpo_cli.core.rollout.selfcheck.load", lambda *_, **__: pytest.fail("loaded a model"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    before = everything(tmp_path)
    found = countdown(*arguments)
    assert found.code == 2
    assert said in found.err
    assert everything(tmp_path) == before


def test_a_disk_that_fills_up_while_logging_is_one_sentence(
    trained: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tmp_path / "runs" / "first" / "samples.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = Run.log_samples

    def full(run: Run, samples: Iterable[Mapping[str, object]]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
        try:
            log(run, samples)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log_samples", full)
        found = trained("train", "--run", "first", "--resume", "--num-iterations", "4")
    assert found.code == 1
    assert "error: File too large" in found.err and "Traceback" not in found.err
    assert trained("train", "--run", "first", "--resume").code == 0  # on from step 2, the half line forgotten
    lines = (tmp_path / "runs" / "first" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_curves_that_cannot_be_drawn_do_not_end_a_training(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, then a style that is not there."""
    errors = iter([OSError(28, "No space left on device"), *[KeyError("style")] * 2])

    def fail(*_: object) -> None:
        raise next(errors)

    monkeypatch.setattr("grpo_cli.cli.artifacts.draw", fail)
    found = countdown("train", "--model", tiny_folder, "--run", "first", *SHORT)
    assert found.code == 0
    assert found.err.count("curves were not written: ") == 3
    assert Path("runs/first/summary.json").is_file()


# One run, two writers


@pytest.mark.parametrize("how", [["--resume"], ["--overwrite"]])
def test_a_run_that_is_being_written_is_left_alone(trained: Command, tmp_path: Path, how: list[str]) -> None:
    run = Run(tmp_path / "runs" / "first")
    before = {path: content for path, content in everything(run.path).items() if path.name != ".lock"}
    with run.locked():
        found = trained("train", "--run", "first", *how, *(SHORT if how == ["--overwrite"] else []))
    assert found.code == 2
    assert f"run `first` is being written by process {os.getpid()}" in found.err
    assert {path: content for path, content in everything(run.path).items() if path.name != ".lock"} == before


def test_a_stale_lock_is_taken_over_with_a_notice(trained: Command, tmp_path: Path) -> None:
    (tmp_path / "runs" / "first" / ".lock").write_text(str(os.getpid()))
    found = trained("train", "--run", "first", "--resume", "--num-iterations", "3")
    assert found.code == 0
    assert f"taking over run first: process {os.getpid()}, which wrote it, no longer holds its lock" in found.err


def test_damaged_logs_stop_neither_resume_nor_eval(trained: Command, tmp_path: Path) -> None:
    for name in ("metrics", "samples"):
        path = tmp_path / "runs" / "first" / f"{name}.jsonl"
        path.write_bytes(b"\x00\xff garbage\n" + path.read_bytes())
    found = trained("eval", "first", "--limit", "2", "--max-new-tokens", 8)
    assert found.code == 0 and "1 damaged line of samples left out" in " ".join((found.out + found.err).split())
    found = trained("train", "--run", "runs/first", "--resume", "--num-iterations", "3")
    assert found.code == 0
    assert "moved 1 damaged line of `runs/first/metrics.jsonl` to `metrics.jsonl.damaged`" in found.err
    assert [line["step"] for line in Run(tmp_path / "runs" / "first").metrics()] == [0, 1, 2, 3]


def test_a_start_that_fails_leaves_nothing(
    countdown: Command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("grpo_cli.core.files.sync", full)
        found = countdown("train", "--model", tiny_folder, "--run", "first", *SHORT)
    assert found.code == 1 and "No space left on device" in found.err
    assert list((tmp_path / "runs").iterdir()) == []
    assert countdown("train", "--model", tiny_folder, "--run", "first", *SHORT).code == 0


# Names


def test_a_run_is_named_as_it_is_printed_and_a_mistyped_one_is_suggested(trained: Command) -> None:
    for arguments in (["eval", "runs/first", "--limit", "2", "--max-new-tokens", "8"], ["plot", "./runs/first/"]):
        assert trained(*arguments).code == 0
    for arguments in (
        ["eval", "frist"],
        ["plot", "frist"],
        ["solve", "4 7 3 = 25", "--model", "frist"],
        ["train", "--model", "frist"],
    ):
        found = trained(*arguments)
        assert found.code == 2 and "did you mean `first`?" in found.err
    found = trained("train", "--run", "frist", "--resume")
    assert found.code == 2 and "did you mean `first`?" in found.err


REFUSED_EARLY = [
    ["eval", "./nowhere"],
    ["eval", "."],
    ["solve", "4 7 3 = 25", "--model", "./nowhere"],
    ["train", "--model", "x"],
    ["train", "--run", "builtin"],
    ["train", "--run", "nowhere", "--resume"],
    ["eval", "--out", "nowhere/file"],
    ["eval", "--suite", "nothing"],
    ["solve", "5 = 5"],
    ["solve", "what is love"],
    ["solve", "4 7 3 = 2 5"],
    ["solve", "1 2 = x"],
]


def test_a_mistyped_model_or_run_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    code = "import sys; from grpo_cli.cli import app\nfor line in LINES:\n    sys.argv = ['countdown', *line]\n"
    code += "    try: app.main()\n    except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", f"LINES = {REFUSED_EARLY!r}\n{code}"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout == "2 False\n" * len(REFUSED_EARLY), found.stderr


def test_the_built_in_model_is_not_replaced_by_a_run_of_its_name(trained: Command, tmp_path: Path) -> None:
    found = trained("train", "--run", "builtin")
    assert found.code == 2 and "`builtin` cannot name a run" in found.err
    (tmp_path / "runs" / "first").rename(tmp_path / "runs" / "builtin")
    found = trained("eval", "builtin", "--limit", "2", "--max-new-tokens", 8)
    assert found.code == 0 and "`builtin` is the built-in model, not the folder" in " ".join(found.err.split())
    assert "recipe of builtin" in " ".join((found.err + found.out).split())


# What is written


def test_an_evaluation_is_shown_before_it_is_written(trained: Command, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert trained("eval", "first", "--limit", "5", "--out", "whole.jsonl").code == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        found = trained("eval", "first", "--limit", "5", "--out", "all.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.code == 1 and "accuracy" in found.out and "cannot write `all.jsonl`" in found.err
    kept = (tmp_path / "all.jsonl.part").read_bytes()
    assert whole.startswith(kept) and kept.endswith(b"\n")
    assert f"the first {kept.count(bytes([10]))} of 5 lines are in `all.jsonl.part`" in found.err
    assert not (tmp_path / "all.jsonl").exists()


def test_plots_of_several_runs_replace_nothing(trained: Command, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "runs" / "first", tmp_path / "runs" / "second")
    for name in ("report.html", "training_curve.png"):
        (tmp_path / name).write_text("mine")
    found = trained("plot", "first", "second", "--report")
    assert found.code == 0
    assert [Path(line).parent for line in found.out.splitlines()[:3]] == [Path("plots/first+second")] * 3
    assert (tmp_path / "report.html").read_text() == (tmp_path / "training_curve.png").read_text() == "mine"
    again = trained("plot", "first", "second", "--report")
    assert again.code == 2 and "exists" in again.err and "--overwrite" in again.err
    assert trained("plot", "first", "second", "--overwrite").code == 0
    alone = trained("plot", "runs/first/metrics.jsonl")
    assert alone.code == 2 and "`training_curve.png` exists" in alone.err


# Resumed as something else


def other_weights(folder: Path) -> None:
    flip(folder / "model.safetensors")


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_over|>"))
    configure(folder, "tokenizer_config.json", eos_token="<|im_over|>")


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("Answer truthfully. " + path.read_text())


def other_size(folder: Path) -> None:
    shutil.rmtree(folder)
    save_tiny_model(folder, hidden_size=16, num_attention_heads=2)


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        (other_weights, "other weights"),
        (other_tokenizer, "other tokenizer"),
        (other_template, "other tokenizer"),
        (other_size, "other weights"),
    ],
)
def test_the_reference_is_the_model_that_the_run_started_from(
    countdown: Command, from_a_copy: Path, tmp_path: Path, swap: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(from_a_copy, tmp_path, dirs_exist_ok=True)
    swap(tmp_path / "model")
    before = everything(tmp_path / "runs")
    found = countdown("train", "--run", "first", "--resume", "--num-iterations", "5")
    assert found.code == 2
    assert "run `first` did not start from this `model`" in found.err and said in " ".join(found.err.split())
    assert everything(tmp_path / "runs") == before


@pytest.fixture(scope="module")
def from_a_copy(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, and a run that started from it."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(tiny_folder, folder / "model")
    run_here(folder, "train", "--model", "model", "--run", "first", *SMALL)
    return folder


def test_a_reference_of_its_own_is_used_and_must_stay_what_it_was(
    countdown: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", hidden_size=16, num_attention_heads=2)
    flags = ["--model", tiny_folder, "--beta", "0.1", *SMALL]
    assert countdown("train", "--run", "first", "--ref-model", "other", *flags).code == 0
    run = Run.open(tmp_path / "runs", "first")
    assert run.metrics()[1]["kl"] > 0.01 and "reference" in run.read_origin()
    other_weights(tmp_path / "other")
    found = countdown("train", "--run", "first", "--resume", "--num-iterations", "5")
    assert found.code == 2 and "`other` as its reference" in " ".join(found.err.split())


def test_a_reference_that_reads_other_tokens_is_refused(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "other")
    other_template(tmp_path / "other")
    flags = ["--model", tiny_folder, "--beta", "0.1", "--ref-model"]
    found = countdown("train", *flags, "other", *SHORT)
    assert found.code == 2 and "have different tokenizers" in " ".join(found.err.split())
    missing = countdown("train", *flags, "./nowhere", *SHORT)
    assert missing.code == 2 and "nowhere" in missing.err
    assert not list(tmp_path.glob("runs/*"))


def test_other_puzzles_are_not_taken_for_those_of_the_run(trained: Command, set_puzzles: SetPuzzles) -> None:
    set_puzzles(lambda *asked: puzzle_set(*asked)[1:])
    found = trained("train", "--run", "first", "--resume", "--num-iterations", "5")
    assert found.code == 2
    assert "other train problems and val problems" in found.err


def test_settings_edited_in_the_run_folder_are_noticed(trained: Command, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first" / "config.json"
    config = json.loads(path.read_text())
    config["train"]["seed"] = 9
    path.write_text(json.dumps(config))
    found = trained("train", "--run", "first", "--resume")
    assert found.code == 2
    assert "has changed since step 2 was saved" in found.err


def test_a_flag_that_would_change_the_run_is_refused(trained: Command) -> None:
    found = trained("train", "--run", "first", "--resume", "--learning-rate", "1e-3")
    assert found.code == 2 and "a resumed run cannot change" in found.err and "0.001" in found.err


def test_a_run_does_not_get_shorter(trained: Command) -> None:
    found = trained("train", "--run", "first", "--resume", "--num-iterations", 1)
    assert found.code == 2 and "step 2 of run `first` is beyond `--num-iterations 1`" in found.err


def test_what_auto_stood_for_is_kept(trained: Command, tmp_path: Path) -> None:
    saved = json.loads((tmp_path / "runs" / "first" / "config.json").read_text())
    assert (saved["train"]["optimizer"], saved["model"]["precision"]) == ("adamw", "float32")
    facts = Run(tmp_path / "runs" / "first").manifest(2)
    assert {"config", "model", "optimizer", "torch", "transformers", "files"} <= facts.keys()


# Signals and kills in whole trainings


def assert_same_run(found: Run, expected: Run, steps: int) -> None:
    """Weights, optimizer, progress, metrics and samples are equal, bit for bit."""
    weights = [run.checkpoint_path(steps) / "model" / "model.safetensors" for run in (found, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    states = [torch.load(run.checkpoint_path(steps) / "state.pt", weights_only=True) for run in (found, expected)]
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
    assert timeless(found) == timeless(expected)
    assert (found.path / "samples.jsonl").read_bytes() == (expected.path / "samples.jsonl").read_bytes()
    for run in (found, expected):
        assert run.damage(steps) is None


# Signals

SHORT = ["--precision", "float32", "--batch-size", "2", "--num-generations", "2", "--max-new-tokens", "8"]
SHORT += ["--num-iterations", "3", "--eval-every", "1", "--eval-puzzles", "2", "--save-every", "3"]
SHORT += ["--micro-batch-size", "2", "--num-inner-updates", "2", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("undisturbed")
    run_here(root, "train", "--run", "whole", "--model", tiny_folder, *SHORT)
    return Run(root / "runs" / "whole")


Function = Callable[..., object]


def before_call(at: int) -> Callable[[Function, Function], Function]:
    """Something else happens before call number `at`."""

    def wrap(function: Function, act: Function) -> Function:
        calls = count(1)

        def wrapped(*arguments: object, **options: object) -> object:
            if next(calls) == at:
                act()
            return function(*arguments, **options)

        return wrapped

    return wrap


def at_token(call: int) -> Callable[[Function, Function], Function]:
    """Something else happens after the third token of the training's call number `call` of `sample`."""

    def wrap(function: Function, act: Function) -> Function:
        calls = count(1)

        def wrapped(*arguments: object, on_token: Callable[[int], None] | None = None, **options: object) -> object:
            if on_token is None:  # by the self-check
                return function(*arguments, **options)
            chosen = next(calls) == call

            def told(tokens: int) -> None:
                if chosen and tokens == 3:
                    act()
                on_token(tokens)

            return function(*arguments, on_token=told, **options)

        return wrapped

    return wrap


SAMPLE = "grpo_cli.core.rollout.local.LocalEngine.sample"  # once for each step and each evaluation
# The moment, what is interrupted there, and the step that is saved. A step asks for log-probabilities six times: for
# two micro-batches of the reference, two of the first inner update and two of the second.
MOMENTS: dict[str, tuple[str, Callable[[Function, Function], Function], int]] = {
    "first evaluation": (SAMPLE, at_token(1), 0),
    "rollout of step 1": (SAMPLE, at_token(2), 0),
    "rollout of step 2": (SAMPLE, at_token(4), 1),
    "evaluation after step 2": (SAMPLE, at_token(5), 2),
    "last evaluation": (SAMPLE, at_token(7), 3),
    "scoring of step 2": (
        "grpo_cli.core.task.countdown.score",
        before_call(3 * 4 + 1),
        1,
    ),  # evaluations and steps have 4
    "reference pass of step 2": ("grpo_cli.core.model.policy.Policy.logprobs", before_call(6 + 1), 1),
    "update of step 2": ("grpo_cli.core.model.policy.Policy.logprobs", before_call(6 + 3), 1),
    "second inner update of step 2": ("grpo_cli.core.model.policy.Policy.logprobs", before_call(6 + 5), 2),
    "saving of the best model": ("grpo_cli.core.model.policy.Policy.save", before_call(1), 1),
}


QUICK = ["first evaluation", "rollout of step 2", "scoring of step 2", "second inner update of step 2"]
QUICK += ["saving of the best model", "last evaluation"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=() if moment in QUICK else pytest.mark.slow) for moment in MOMENTS]
)
def test_a_signal_at_any_moment_saves_the_last_completed_step_and_changes_nothing(
    countdown: Command,
    undisturbed: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    number: int,
    code: int,
) -> None:
    monkeypatch.setattr("grpo_cli.cli.artifacts.draw", lambda *_: [])  # most of the time of so small a training
    place, wrap, saved = MOMENTS[moment]
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        patch.setattr(place, wrap(resolve_name(place), lambda: signal.raise_signal(number)))
        found = countdown("train", "--model", tiny_folder, "--run", "stopped", *SHORT)
    assert found.code == code
    assert f"stopped after step {saved}; resume with: countdown train --run stopped --resume" in found.err
    run = Run(tmp_path / "runs" / "stopped")
    assert [step for step, _ in run.checkpoints()] == [saved]
    assert handlers == [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)]
    assert countdown("train", "--run", "stopped", "--resume").code == 0
    assert_same_run(run, undisturbed, 3)


SECOND_SIGNAL = """
import signal
from grpo_cli.core.rl import train
update, calls = train.update, []
def stopped(*arguments, **options):
    calls.append(0)
    if len(calls) == 2:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SECOND)
    return update(*arguments, **options)
train.update = stopped
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_whole(
    tiny_folder: Path, tmp_path: Path, second: signal.Signals
) -> None:
    """The first signal is answered between tokens, so the process sends the second before any poll."""
    arguments = ["train", "--run", "first", "--model", tiny_folder, *SHORT, "--save-every", "1"]
    process = Forked(tmp_path, *arguments, code=SECOND_SIGNAL.replace("SECOND", second.name))
    code, output = process.ended()
    assert code == -second and "Traceback" not in output, output
    run = Run(tmp_path / "runs" / "first")
    assert [step for step, _ in run.checkpoints()] == [1]
    assert run.damage(1) is None


def test_a_checkpoint_is_saved_on_demand(
    countdown: Command, undisturbed: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, wrap, _ = MOMENTS["rollout of step 2"]
    monkeypatch.setattr(place, wrap(resolve_name(place), lambda: signal.raise_signal(signal.SIGUSR1)))
    assert countdown("train", "--model", tiny_folder, "--run", "asked", *SHORT).code == 0
    run = Run(tmp_path / "runs" / "asked")
    assert [step for step, _ in run.checkpoints()] == [2, 3]
    assert_same_run(run, undisturbed, 3)


def test_a_checkpoint_is_saved_by_the_clock(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    flags = [*SHORT, "--keep-last", "9", "--save-every", "100", "--eval-every", "100", "--num-inner-updates", "1"]
    assert countdown("train", "--model", tiny_folder, "--run", "often", *flags, "--save-minutes", "1e-9").code == 0
    assert [step for step, _ in Run(tmp_path / "runs" / "often").checkpoints()] == [1, 2, 3]


def begin(folder: Path, tiny_folder: Path, code: str = "") -> Forked:
    """A training of many short steps in a process of its own, after its first step."""
    line = ["train", "--model", tiny_folder, "--run", "first", *SHORT, "--num-iterations", "100000"]
    process = Forked(folder, *line, "--eval-every", "100000", "--save-every", "100000", code=code)
    process.read_until("step 1 ")
    return process


@pytest.mark.parametrize(("name", "code"), [("hangup", 129), ("pipe", 141)])
def test_a_terminal_that_closes_and_a_pipe_that_nobody_reads_save_the_training(
    tiny_folder: Path, tmp_path: Path, name: str, code: int
) -> None:
    process = begin(tmp_path, tiny_folder)
    if name == "hangup":
        process.send(signal.SIGHUP)  # sent twice by a terminal: by the system and by the shell
        process.send(signal.SIGHUP)
    process.output.close()
    assert process.ended()[0] == code
    saved = Run(tmp_path / "runs" / "first")
    steps = [step for step, _ in saved.checkpoints()]
    assert len(steps) == 1 and saved.damage(steps[0]) is None


def test_nohup_keeps_a_training_running(tiny_folder: Path, tmp_path: Path) -> None:
    process = begin(tmp_path, tiny_folder, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send(signal.SIGHUP)
    for _ in range(3):
        assert process.output.readline()
    process.send(signal.SIGTERM)
    assert process.ended()[0] == 143


# Weights that are not finite


@pytest.mark.parametrize("saved", [True, False])
def test_weights_that_are_not_finite_are_never_saved(
    countdown: Command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    step = torch.optim.AdamW.step
    calls = count(1)

    def overflowing(optimizer: torch.optim.AdamW, *arguments: object) -> object:
        found = step(optimizer, *arguments)
        if next(calls) == (3 if saved else 1):  # a step has two
            for group in optimizer.param_groups:
                group["params"][0].data.fill_(float("inf"))
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    found = countdown("train", "--model", tiny_folder, "--run", "first", *SHORT, "--save-every", "1")
    run = Run(tmp_path / "runs" / "first")
    if not saved:
        assert found.code == 1 and "the weights after the step are not finite" in found.err
        assert run.checkpoints() == [] and not run.model_path.exists()
        return
    assert found.code == 0, found.err
    assert "the weights after the step are not finite; the weights are restored from step 1" in found.err
    assert [line["bad_steps"] for line in run.metrics() if line["step"] > 0] == [0, 1, 1]
    weights = [load_file(path / "model" / "model.safetensors") for _, path in run.checkpoints()]
    assert all(bool(tensor.isfinite().all()) for tensors in weights for tensor in tensors.values())


# Kills

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
    def begin(*arguments: str) -> subprocess.Popen[str]:
        line = command(tiny_folder, tmp_path, *arguments)
        return subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

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
    assert_same_run(Run(tmp_path / "killed"), Run(tmp_path / "whole"), STEPS)
