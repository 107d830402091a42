"""The benchmarks: their plain path computes what ours does, and each script runs from end to end on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_cli.core.model.policy import Policy, Sequences

ROOT = Path(__file__).parent.parent
PROMPTS = [[5, 9, 200, 31], [7, 7, 3, 90, 12, 400, 8]]
COMPLETIONS = [[11, 12, 13], [14], [15, 16, 17, 18, 19], [20, 21]]
OWNERS = [0, 0, 1, 1]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("step")


@pytest.fixture
def plain(tiny_folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model


def run(script: str, out: Path, *arguments: object) -> tuple[str, Any]:
    """What a script prints and writes."""
    command = [sys.executable, ROOT / "benchmarks" / script, "--out", out, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_solvers_times_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["solver.py", "--puzzles", "2"])
    runpy.run_path(str(ROOT / "benchmarks" / "solver.py"), run_name="__main__")
    assert capsys.readouterr().out.count("all solutions") == 5


@pytest.mark.parametrize("chosen", [list(range(len(COMPLETIONS))), [1]])
def test_padded_rows_have_the_log_probabilities_of_packed_ones(
    step: Any, tiny_policy: Policy, plain: PreTrainedModel, chosen: list[int]
) -> None:
    prompts = [PROMPTS[owner] for owner in OWNERS]
    found, mask = step.padded_logprobs(plain, prompts, COMPLETIONS, chosen)  # aligned on the right
    expected, _ = tiny_policy.logprobs(Sequences(PROMPTS, COMPLETIONS, OWNERS), temperature=step.TEMPERATURE)
    for place, row in enumerate(chosen):
        length = len(COMPLETIONS[row])
        assert int(mask[place].sum()) == length
        torch.testing.assert_close(found[place, mask[place]], expected[row, :length], atol=1e-5, rtol=0)
    assert not found[~mask].any()


def test_what_generate_samples_is_cut_after_its_first_end_of_sequence_id(
    step: Any, tiny_policy: Policy, plain: PreTrainedModel
) -> None:
    policy = replace(tiny_policy, end_ids=tuple(range(0, 832, 4)))
    torch.manual_seed(0)
    found = step.generated(policy, plain, PROMPTS * 8, 6)
    ended = [row for row in found if row[-1] in policy.end_ids]
    assert all(token not in policy.end_ids for row in found for token in row[:-1])
    assert all(len(row) == 6 for row in found if row not in ended)
    assert len({len(row) for row in ended}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["natural", "none"])
def test_a_step_is_measured_by_phase(tiny_folder: Path, tmp_path: Path, ends: str) -> None:
    shape = ["--prompts", 2, "--completions", 3, "--tokens", 5, "--ends", ends, "--precision", "float32"]
    shown, written = run(
        "step.py", tmp_path / "step.json", "--rounds", 1, "--model", tiny_folder, "--without", "TRL", *shape
    )
    rounds = written["results"][0]["rounds"]
    assert rounds.keys() == {"plain", "countdown"}
    for (taken,) in rounds.values():
        assert taken["tokens"] == 30 if ends == "none" else 6 <= taken["tokens"] <= 30
        phases = [taken["seconds"][phase] for phase in ("rollout", "reference", "update")]
        assert min(phases) > 0 and sum(phases) <= taken["seconds"]["total"]
    assert "| 2 x 3 x 5 | plain, float32 |" in shown


@pytest.mark.slow
def test_growth_is_measured_one_quantity_at_a_time(tiny_folder: Path, tmp_path: Path) -> None:
    wanted = ["--only", "prompts", "--up-to", 2, "--precision", "float32"]
    _, written = run("growth.py", tmp_path / "growth.json", "--rounds", 1, "--model", tiny_folder, *wanted)
    first, second = written["results"]
    assert [case["value"] for case in (first, second)] == [1, 2]
    assert [case["rounds"][0]["tokens"] for case in (first, second)] == [1 * 16 * 160, 2 * 16 * 160]
    assert {**first["work"], "prompts": 2} == second["work"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_a_profile_counts_kernels_of_the_device_alone(gpu: Any) -> None:
    kinds = torch.autograd.DeviceType  # type: ignore[attr-defined]
    events = [
        SimpleNamespace(key=key, device_type=kind, count=2, self_device_time_total=1000 * ms, self_cpu_time_total=9)
        for key, kind, ms in (("launch", kinds.CPU, 9), ("memset", kinds.CUDA, 1), ("flash_fwd", kinds.CUDA, 5))
    ]
    assert gpu.slowest(events, cuda=True) == [("flash_fwd", 2, 5.0), ("memset", 2, 1.0)]


def test_a_row_that_fails_says_why(gpu: Any) -> None:
    assert gpu.measure(partial(divmod, 1, 0))["failed"].startswith("ZeroDivisionError: ")
    assert gpu.measure(partial(divmod, 7, 2))["value"] == (3, 1)


SMALL = ["--shape", "tiny", "--prompts", 2, "--prompt-tokens", 8, "--completions", 2, "--tokens", 4, "--rounds", 1]


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path: Path) -> None:
    shown, written = run("gpu.py", tmp_path / "gpu.json", *SMALL)
    assert "failed" not in shown and len(written["results"]) == 12
    step = written["results"]["step, fused"]["value"]
    assert step["mfu"].keys() == {"update", "total"} and all(0 < share < 1 for share in step["mfu"].values())
    assert {"allocated, GB", "reserved, GB"} < step.keys()


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_begins_no_row_when_its_time_is_over(tmp_path: Path) -> None:
    shown, written = run("gpu.py", tmp_path / "gpu.json", *SMALL, "--limit", 0)
    assert shown.count("no time left") == 11 and written["results"]["versions"]["failed"] == "no time left"
