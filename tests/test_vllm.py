"""vLLM as the engine: `pytest -m vllm` in an environment with vLLM (docs/gpus.md); what needs no vLLM runs always."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Command
from test_rollout import encoded

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rollout.engine import Engine, uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.make import make_engine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.vllm import VllmEngine
from grpo_cli.core.world import World

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_named_before_a_model_loads(countdown: Command) -> None:
    for given in (["eval", "builtin", "--limit", 1], ["train", "--num-iterations", 1], ["solve", "3 5 2 = 13"]):
        found = countdown(*given, "--rollout", "vllm")
        assert found.code == 2 and "the package `vllm` is not installed" in found.err


def test_several_processes_are_refused(tiny_policy: Policy) -> None:
    settings = resolve(flags={"model.rollout": "vllm"}).settings
    with pytest.raises(CountdownError, match="runs in one process"):
        make_engine(tiny_policy, settings, max_new_tokens=8, world=World(1, 2))
    assert isinstance(make_engine(tiny_policy, resolve().settings, max_new_tokens=8), LocalEngine)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> VllmEngine:
    pytest.importorskip("vllm")
    from grpo_cli.cli import app
    from grpo_cli.core.model.load import load

    app._set_environment()
    return VllmEngine(load("builtin", device="cpu", precision="float32"), 1024, 0.3)


def gap(engine: Engine, temperature: float = 1.3) -> float:
    """The largest distance between vLLM's log-probs of its samples and the policy's."""
    policy = engine.policy
    prompts = encoded(policy)
    engine.update_weights()
    rollout = engine.sample(prompts, SamplingParams(20, temperature, 2), uniform=uniforms(0, 1, range(3), 2, 20))
    assert [len(row) for row in rollout.completions] == [len(row) for row in rollout.logprobs]
    ended = [row[-1] in policy.end_ids for row in rollout.completions]
    assert rollout.truncated == [not end for end in ended] and len(ended) == 6
    with torch.no_grad():
        ours, _ = policy.logprobs(Sequences(prompts, rollout.completions, [0, 0, 1, 1, 2, 2]), temperature=temperature)
    return max(
        float((own[: len(theirs)] - torch.tensor(theirs)).abs().max())
        for own, theirs in zip(ours, rollout.logprobs, strict=True)
    )


def assert_follows(engine: Engine) -> None:
    """Log-probs are those of the policy, whatever weights change."""
    assert gap(engine) < 1e-4 and gap(engine, 0.7) < 1e-4
    for part in ("norm", "bias", "embed", "o_proj", "down_proj", "q_proj", "gate"):
        with torch.no_grad():
            for name, weight in engine.policy.model.named_parameters():
                if part in name:
                    weight.add_(0.02 * torch.randn_like(weight))
        assert gap(engine) < 1e-4, part


@pytest.mark.vllm
def test_log_probs_are_those_of_the_policy_whatever_weight_changes(engine: VllmEngine) -> None:
    assert_follows(engine)


@pytest.mark.vllm
def test_greedy_completions_are_those_of_the_local_engine(engine: VllmEngine) -> None:
    policy = engine.policy
    engine.update_weights()
    prompts = encoded(policy)
    found, local = (one.sample(prompts, SamplingParams(60, 0.0), uniform=None) for one in (engine, LocalEngine(policy)))
    assert found.completions == local.completions and found.truncated == local.truncated


@pytest.mark.vllm
def test_old_weights_are_an_error_not_noise(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmEngine, "_load_weights", lambda self: None)
    with torch.no_grad():
        for weight in engine.policy.model.parameters():
            weight.add_(0.001 * torch.randn_like(weight))
    with pytest.raises(CountdownError, match="vLLM has other weights than the policy"):
        gap(engine)


@pytest.mark.vllm
def test_a_training_samples_with_vllm_and_stays_close_to_the_trainer(countdown: Command, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    found = countdown(
        "train", "--run", "one", "--rollout", "vllm", "--num-iterations", 2, "--batch-size", 2, "--num-generations", 4,
        "--max-new-tokens", 60, "--eval-puzzles", 4, "--eval-every", 2, "--precision", "float32",
        "--learning-rate", 1e-3,
    )  # fmt: skip
    assert found.code == 0, found.err
    lines = [json.loads(line) for line in (tmp_path / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["sampler_gap"] < 1e-4 for line in lines if "sampler_gap" in line)
    assert any("sampler_gap" in line for line in lines)
