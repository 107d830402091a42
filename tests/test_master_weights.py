"""MasterWeights: a float32 optimizer's steps, whatever the weights can hold, saved and taken up on any device."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import state_of, train
from test_train import Watcher, small
from torch import Tensor

from grpo_cli.core.model import master_weights as masters_module
from grpo_cli.core.model.load import load
from grpo_cli.core.model.master_weights import MasterWeights
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.state import State, build_optimizer
from grpo_cli.core.run.folder import Run

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


def adamw(weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=2e-6, weight_decay=0.0)


def adamw8bit(weights: list[Tensor]) -> torch.optim.Optimizer:
    return bitsandbytes.optim.AdamW8bit(weights, lr=2e-6, weight_decay=0.0)  # type: ignore[no-any-return]


def some_weights() -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(64, 80), (7,), (3, 5, 2)]
    return [torch.nn.Parameter(0.02 * torch.randn(shape, generator=rng).bfloat16()) for shape in shapes]


def stepped(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for weight in weights[: 2 + step % 2]:  # the last one has no gradient in every other step
            weight.grad = torch.randn(weight.shape, generator=rng).bfloat16().to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("build", [adamw, adamw8bit])
@pytest.mark.parametrize("at_once", [2**27, 30])
def test_masters_take_the_steps_of_float32_weights(monkeypatch: pytest.MonkeyPatch, build: Build, at_once: int) -> None:
    monkeypatch.setattr(masters_module, "PART_WEIGHTS", at_once)
    weights = some_weights()
    exact = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    ours, theirs = MasterWeights(weights, build), build(list(exact))
    stepped(ours, weights, range(20))
    stepped(theirs, exact, range(20))
    for weight, master, expected in zip(weights, ours.masters, exact, strict=True):
        assert torch.equal(master, expected)
        assert torch.equal(weight, expected.bfloat16())
        assert weight.grad is None and master.grad is None


def test_small_steps_add_up_in_masters_and_are_lost_without() -> None:
    weights, alone = some_weights(), some_weights()
    start = [weight.detach().clone() for weight in weights]
    ours, theirs = MasterWeights(weights, adamw), adamw(list(alone))
    for _ in range(100):
        for weight in (*weights, *alone):
            weight.grad = torch.ones_like(weight)
        ours.step()
        theirs.step()
    for before, master in zip(start, ours.masters, strict=True):
        torch.testing.assert_close(before.float() - master, torch.full(master.shape, 2e-4), rtol=0.01, atol=1e-8)
    moved = torch.cat([(old != new).flatten() for old, new in zip(start, weights, strict=True)]).float().mean()
    stuck = torch.cat([(old == new).flatten() for old, new in zip(start, alone, strict=True)]).float().mean()
    assert moved > 0.9 and stuck > 0.9


def test_the_learning_rate_of_the_groups_is_the_inner_optimizers() -> None:
    weights = some_weights()
    optimizer = MasterWeights(weights, adamw)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    weights[1].grad = torch.ones_like(weights[1])
    before = optimizer.masters[1].clone()
    optimizer.step()
    torch.testing.assert_close(before - optimizer.masters[1], torch.full((7,), 0.5))


@pytest.mark.parametrize("build", [adamw, adamw8bit])
def test_a_saved_state_goes_on_bit_by_bit(tmp_path: Path, build: Build) -> None:
    weights = some_weights()
    whole = MasterWeights(weights, build)
    stepped(whole, weights, range(5))
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    again = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    taken_up = MasterWeights(again, build)
    taken_up.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    stepped(whole, weights, range(5, 9))
    stepped(taken_up, again, range(5, 9))
    assert all(map(torch.equal, whole.masters, taken_up.masters))
    assert all(map(torch.equal, weights, again))


def with_masters(source: Path | str) -> Policy:
    """As `bf16-master` is on a GPU."""
    return replace(load(str(source), device="cpu", precision="bf16"), precision="bf16-master")


@pytest.mark.parametrize("optimizer", ["adamw8bit", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_run_with_masters_is_taken_up_where_it_stopped(tiny_folder: Path, tmp_path: Path, optimizer: str) -> None:
    settings = small(tiny_folder, **{"train.optimizer": optimizer, "model.precision": "bf16-master"})

    def start(source: Path | str) -> State:
        policy = with_masters(source)
        return state_of(policy, optimizer=optimizer)

    reference = Reference.of(with_masters(tiny_folder))
    whole, run, watcher = start(tiny_folder), Run.create(tmp_path, "whole"), Watcher()
    train(whole, reference, run, settings, watcher)
    assert isinstance(whole.optimizer, MasterWeights)
    assert {weight.dtype for weight in whole.policy.model.parameters()} == {torch.bfloat16}
    assert all(metrics["weights_changed"] > 0.9 for metrics in watcher.metrics if metrics["zero_variance"] < 1)

    folder = run.checkpoint_path(2)
    part = start(folder / "model")
    part.restore(folder)
    assert part.progress.step == 2
    train(part, reference, Run.create(tmp_path, "part"), settings, Watcher())
    assert isinstance(part.optimizer, MasterWeights)
    assert all(map(torch.equal, whole.optimizer.masters, part.optimizer.masters))


def test_a_run_goes_on_where_there_are_no_masters_and_where_there_are(tiny_folder: Path, tmp_path: Path) -> None:
    settings = small(tiny_folder, **{"model.precision": "bf16-master"})
    run = Run.create(tmp_path, "moved")
    here, there = with_masters(tiny_folder), load(str(tiny_folder), device="cpu", precision="bf16-master")
    starts = [state_of(policy, optimizer="adamw") for policy in (here, there)]
    for number, training in enumerate(starts, 1):
        for weight in training.policy.model.parameters():
            weight.grad = torch.ones_like(weight)
        training.optimizer.param_groups[0]["lr"] = 1e-5
        training.optimizer.step()
        training.progress.step = number
        training.save(run, settings)
    masters, plain = starts
    assert isinstance(masters.optimizer, MasterWeights)

    folder = run.checkpoint_path(1)
    onto_float32 = load(str(folder / "model"), device="cpu", precision="bf16-master")
    taken_up = state_of(onto_float32, optimizer="adamw")
    taken_up.restore(folder)
    assert all(map(torch.equal, masters.optimizer.masters, onto_float32.model.parameters()))

    folder = run.checkpoint_path(2)
    onto_masters = with_masters(folder / "model")
    taken_up = state_of(onto_masters, optimizer="adamw")
    taken_up.restore(folder)
    assert isinstance(taken_up.optimizer, MasterWeights)
    assert all(map(torch.equal, taken_up.optimizer.masters, plain.policy.model.parameters()))


def test_resuming_loads_the_optimizers_state_on_the_host(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would else hold it twice. The meta device stands for one: what is loaded there holds no numbers."""
    policy = with_masters(tiny_folder)
    saved = state_of(policy, optimizer="adamw8bit")
    run = Run.create(tmp_path, "saved")
    saved.save(run, small(tiny_folder, **{"model.precision": "bf16-master"}))
    training = state_of(with_masters(tiny_folder), optimizer="adamw8bit")
    monkeypatch.setattr(Policy, "device", torch.device("meta"))
    training.restore(run.checkpoint_path(0))
    assert isinstance(training.optimizer, MasterWeights) and isinstance(saved.optimizer, MasterWeights)
    assert all(map(torch.equal, training.optimizer.masters, saved.optimizer.masters))


def test_8_bit_adamw_is_built_without_warnings_of_the_library(tiny_policy: Policy) -> None:
    build_optimizer(tiny_policy, name="adamw8bit", weight_decay=0.0)
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
