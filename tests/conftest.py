"""A tiny model in the format of Qwen2.5 (architecture, tokenizer, chat template), and `countdown` in this process.

torch is imported inside functions: the controller of several workers loads this file, and needs none.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grpo_cli.cli import app as cli
from grpo_cli.cli import artifacts
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.prompts import STYLES, prompt
from grpo_cli.core.task.puzzle import Puzzle

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from grpo_cli.core.config.settings import Loss, Settings
    from grpo_cli.core.evals.evaluate import Evaluation
    from grpo_cli.core.microbatch import MicroBatch
    from grpo_cli.core.model.policy import Policy, Sequences
    from grpo_cli.core.model.reference import Reference
    from grpo_cli.core.rl.observer import Control, Observer
    from grpo_cli.core.rl.state import State

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses: several tests run at once


def pytest_collectstart() -> None:
    """Set up torch before a test module is imported, and import the core before a test patches what it imports."""
    import torch

    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # before anything imports Triton
    import_module("grpo_cli.core.rl.build")


SetPuzzles = Callable[[Callable[..., list[Puzzle]]], None]

# Metrics that differ between equal runs.
MEASURED = ("time", "tokens", "mfu", "peak_memory")


@cache
def tiny_tokenizer() -> Any:
    from grpo_cli.core.builtin.tokenizer import train_tokenizer

    texts = [message["content"] for style in STYLES for message in prompt(Puzzle((3, 5, 2), 13), style)]
    return train_tokenizer(texts, vocabulary=400)


def save_tiny_model(folder: Path, kind: type[PretrainedConfig] | None = None, **changes: object) -> Path:
    """A random model of two layers, with weights large enough for distributions far from uniform."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer = tiny_tokenizer()
    settings: dict[str, object] = {
        "vocab_size": 832, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "initializer_range": 0.25, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config((kind or Qwen2Config)(**{**settings, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def quick_machine() -> Iterator[None]:
    """No test pulls the plug, so none waits for the disk; and none reads how fast the machine is."""
    from grpo_cli.core.perf import utilization

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(utilization, "MATRIX", 64)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def loaded_policy(tiny_folder: Path) -> Policy:
    from grpo_cli.core.model.load import load

    return load(str(tiny_folder), device="cpu", precision="float32")


@pytest.fixture
def tiny_policy(loaded_policy: Policy) -> Policy:
    """A copy of the tiny model for each test."""
    return copy.deepcopy(loaded_policy)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def configure(folder: Path, name: str = "config.json", /, **changes: object) -> None:
    """Change settings in a JSON file of a model's folder."""
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **changes}))


def timeless(run: Run) -> list[dict[str, float]]:
    """The metrics without what differs from one run to the next of the same."""
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in run.metrics()]


@dataclass
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


def main(*arguments: object) -> int:
    """The exit code of `countdown ARGUMENTS` in this process."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["countdown", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
    signal.signal(signal.SIGINT, before)
    return int(ended.value.code or 0)


def run_here(folder: Path, *arguments: object) -> None:
    """`countdown ARGUMENTS` in `folder` and this process, for fixtures that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(*arguments) == 0


@pytest.fixture
def countdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `countdown ARGUMENTS` in an empty folder; trainings draw no curves, half the time of a small one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(artifacts, "draw", lambda *_: [])
    for name in [name for name in os.environ if name.startswith("COUNTDOWN_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object) -> Result:
        code = main(*arguments)
        return Result(code, *capfd.readouterr())

    return call


SMALL = ["--precision", "float32", "--batch-size", "2", "--num-generations", "2", "--max-new-tokens", "8"]
SMALL += ["--num-iterations", "2", "--eval-every", "2", "--eval-puzzles", "2", "--save-every", "1"]


@pytest.fixture(scope="session")
def finished_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    run_here(folder, "train", "--model", tiny_folder, "--run", "first", *SMALL)
    return folder / "runs" / "first"


@pytest.fixture
def trained(countdown: Command, finished_run: Path, tmp_path: Path) -> Command:
    """`countdown` in a folder with a copy of the finished run, `first`."""
    shutil.copytree(finished_run, tmp_path / "runs" / "first")
    return countdown


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    advantages: torch.Tensor,
    *,
    loss: Loss,
    temperature: float,
    max_new_tokens: int,
    num_inner_updates: int = 1,
    clip_grad_norm: float = 1.0,
    micro_batch: MicroBatch | None = None,
    ref_logprobs: torch.Tensor | None = None,
    sampled_logprobs: list[list[float]] | None = None,
    num_mini_batches: int = 1,
    truncated: Sequence[bool] = (),
) -> dict[str, float]:
    """An update by one process."""
    from grpo_cli.core.rl.batch import Examples
    from grpo_cli.core.rl.diagnostics import with_plain_logprobs
    from grpo_cli.core.rl.update import Objective
    from grpo_cli.core.rl.update import update as update_policy

    examples = Examples(sequences, advantages, sampled_logprobs or (), ref_logprobs, truncated=truncated)
    objective = Objective(loss, temperature, max_new_tokens, num_inner_updates, clip_grad_norm, num_mini_batches)
    if sampled_logprobs:
        examples = with_plain_logprobs(examples, policy, loss, temperature=temperature)
    return update_policy(policy, optimizer, examples, objective, micro_batch=micro_batch)


def default_loss(**changes: object) -> Loss:
    """The shipped loss with some settings changed."""
    from grpo_cli.core.config.resolve import defaults
    from grpo_cli.core.config.settings import Loss

    shipped = {key.removeprefix("loss."): value for key, value in defaults().items() if key.startswith("loss.")}
    return Loss.model_validate({**shipped, **changes})


def state_of(policy: Policy, *, optimizer: str = "adamw", step: int = 0) -> State:
    """The state of a training of the policy; at step 0, the starting model is to be evaluated."""
    from grpo_cli.core.rl.state import Progress, State, build_optimizer

    built = build_optimizer(policy, name=optimizer, weight_decay=0.0)
    return State(policy, built, policy, Progress(step, unlogged=None if step else {"step": 0}))


def train(
    state: State,
    reference: Reference | None,
    run: Run,
    settings: Settings,
    observer: Observer,
    control: Control | None = None,
) -> Evaluation:
    """Train by one process, without a memory limit."""
    from grpo_cli.core.rl.build import assemble
    from grpo_cli.core.rl.context import Context
    from grpo_cli.core.rl.observer import Control

    context = Context(observer=observer, control=control or Control())
    return assemble(settings, state, reference, run, context=context).train()


@pytest.fixture
def set_puzzles(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetPuzzles]:
    """Replaces `puzzle_set` for a test; what the task has cached is forgotten before and after."""
    from grpo_cli.core.task import countdown as countdown_task

    def replace_set(puzzles: Callable[..., list[Puzzle]]) -> None:
        monkeypatch.setattr("grpo_cli.core.task.countdown.puzzle_set", puzzles)
        countdown_task._generated.cache_clear()

    yield replace_set
    countdown_task._generated.cache_clear()
