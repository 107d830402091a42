"""Exported models and the task in other programs; `make elsewhere` installs them into an environment of their own."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command

from grpo_cli.core.evals.evaluate import Evaluation, Evaluator
from grpo_cli.core.model import gguf_write
from grpo_cli.core.model.load import BUILTIN, load
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.scoring import score

EXAMPLES = Path(__file__).parent.parent / "examples"
COUNT = 16
elsewhere = pytest.mark.elsewhere


def evaluated(style: Style) -> Evaluation:
    puzzles = list(enumerate_puzzles(split="val"))[:COUNT]
    evaluator = Evaluator(LocalEngine(load("builtin", device="cpu", precision="float32")), SamplingParams(360, 0.0))
    return evaluator.evaluate(puzzles, style=style, split="val")


def run(*command: object, cwd: Path = EXAMPLES) -> str:
    environ = {**os.environ, "PYTHONPATH": str(EXAMPLES), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", ["trl_grpo", "verl_reward", "verifiers_task", "lm_eval_task", "inspect_task"])
def test_an_example_for_another_program_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 40


@pytest.mark.peer
def test_trl_trains_on_the_task(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    out = run(sys.executable, EXAMPLES / "trl_grpo.py", BUILTIN, 2, tmp_path / "out")
    steps = [line for line in re.findall(r"\{.*?\}", out) if "'rewards/reward/mean'" in line]
    assert len(steps) == 2 and all(0 <= float(ast.literal_eval(step)["reward"]) <= 1 for step in steps)
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file()


@elsewhere
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_llama_cpp_answers_as_the_model_does(tmp_path: Path, kind: gguf_write.Type) -> None:
    llama = pytest.importorskip("xllamacpp")
    gguf_write.write(BUILTIN, tmp_path / "model.gguf", kind=kind)
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx = str(tmp_path / "model.gguf"), 2048
    server, expected = llama.Server(settings), evaluated("one-shot")
    solved, equal = 0, 0
    for puzzle, (own,) in zip(expected.puzzles, expected.completions, strict=True):
        asked = {"messages": prompt(puzzle), "temperature": 0, "max_tokens": 360}  # type: ignore[arg-type]
        text = server.handle_chat_completions(asked)["choices"][0]["message"]["content"]
        equal += text.strip() == own.text.strip()
        solved += score(text, puzzle).correct  # type: ignore[arg-type]
    assert abs(solved - expected.accuracy * COUNT) <= 2 and equal >= COUNT - (2 if kind == "f16" else 8)


@elsewhere
def test_lm_evaluation_harness_measures_what_eval_does() -> None:
    pytest.importorskip("lm_eval")
    out = run(sys.executable, "lm_eval_task.py", BUILTIN, COUNT)
    found = ast.literal_eval(out.strip().splitlines()[-1])
    assert found["sample_len"] == COUNT and found["accuracy,none"] == evaluated("zero-shot").accuracy


@elsewhere
def test_inspect_measures_what_eval_does(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    model = f"--model hf/local -M model_path={BUILTIN} -M do_sample=false --limit {COUNT}"
    run("inspect", "eval", "inspect_task.py", *f"{model} --log-dir {tmp_path} --log-format json".split())
    (log,) = tmp_path.glob("*.json")
    scores = json.loads(log.read_text("utf-8"))["results"]["scores"][0]
    assert scores["metrics"]["accuracy"]["value"] == evaluated("one-shot").accuracy


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server of llama.cpp with the built-in model."""
    llama = pytest.importorskip("xllamacpp")
    gguf_write.write(BUILTIN, tmp_path / "model.gguf", kind="f16")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(tmp_path / "model.gguf"), 4096, 2
    server = llama.Server(settings)
    yield server.listening_address


@elsewhere
def test_verifiers_scores_what_eval_does(tmp_path: Path, address: str) -> None:
    pytest.importorskip("verifiers")
    client = f"--model builtin --client.base-url {address}/v1 --client.api-key-var OPENAI_API_KEY --no-push"
    harness = "--env.agent.harness.id null --env.agent.runtime.type subprocess"
    limits = f"--sampling.temperature 0 --sampling.max-tokens 360 --select.limit {COUNT} --output-dir {tmp_path}/out"
    run("vf-eval", "verifiers_task", *f"{client} {harness} {limits}".split())
    (traces,) = tmp_path.rglob("traces.jsonl")
    traces_of = [json.loads(line)["traces"][0] for line in traces.read_text("utf-8").splitlines()]
    solved = sum(trace["rewards"]["reward"]["score"] == 1.0 for trace in traces_of)
    assert len(traces_of) == COUNT and abs(solved - evaluated("zero-shot").accuracy * COUNT) <= 2


@elsewhere
def test_verl_reads_the_puzzles_and_pays_the_reward(countdown: Command, tmp_path: Path) -> None:
    pytest.importorskip("verl")
    pytest.importorskip("pyarrow")
    assert countdown("gen-data", "--columns", "verl", "--split", "val", "--out", tmp_path / "val.parquet").code == 0
    lines = run(sys.executable, "-c", VERL, BUILTIN, tmp_path / "val.parquet").splitlines()
    puzzle, (row, *rewards) = next(iter(enumerate_puzzles(split="val"))), map(ast.literal_eval, lines[-4:])
    assert row == [327, prompt(puzzle)]
    assert rewards == [[1.0, True], [0.2, False], [0.0, False]]


VERL = """
import asyncio, sys, torch
from hydra import compose, initialize_config_module
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", ["reward.custom_reward_function.path=verl_reward.py"])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = RLHFDataset(sys.argv[2], tokenizer, config.data)
print([len(rows), rows[0]["raw_prompt"]])

async def pay(text):
    data = DataProto.from_single_dict(collate_fn([rows[0]]))
    data.batch["responses"] = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    data.batch["attention_mask"] = torch.ones_like(data.batch["responses"])
    paid = await load_reward_manager(config, tokenizer).run_single(data)
    print([paid["reward_score"], paid["reward_extra_info"]["acc"]])

for text in ("<think>.</think><answer>2 - 2 + 2</answer>", "<think>.</think><answer>2</answer>", "2"):
    asyncio.run(pay(text))
"""
