"""Measure the original's workload, with Qwen2.5-1.5B's shape, on one GPU, in one process of at most ten minutes.

    python benchmarks/gpu.py --out gpu.json

4 prompts of 290 tokens by 16 completions of 160, bfloat16 with float32 masters, KL to a frozen reference. Weights are
random: speed and memory do not depend on them. The model is loaded once, and each row is printed and written as it
comes, most knowledge first, so that a machine that is lost costs only the rest. A row that fails says why and ends
nothing else. Times are medians. Without CUDA, the same code runs a tiny shape on the CPU, only to show that it works.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measured import Seconds, peak_bytes, table, timed, write
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_cli.core.builtin.tokenizer import train_tokenizer
from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import load
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.policy import Policy, Sequences, checkpoint_layers
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.perf.utilization import Groups, operations, peak_tflops
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.grpo import advantages
from grpo_cli.core.rl.state import build_optimizer
from grpo_cli.core.rl.update import Objective, reference_logprobs, update
from grpo_cli.core.rollout import selfcheck
from grpo_cli.core.rollout.engine import Rollout, uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.prompts import STYLES, prompt
from grpo_cli.core.task.puzzle import Puzzle

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 1024,
    },
    "0.5b": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151_936,
    },
    "1.5b": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151_936,
    },
}  # fmt: skip
LOSS = resolve().settings.loss.model_copy(update={"loss_type": "grpo", "beta": 0.01})
TEMPERATURE, LEARNING_RATE = 1.2, 2e-6
PHASES = ("prefill", "decode", "reference", "update", "optimizer")
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes")
CAP = 24 * 10**9  # bytes of a smaller GPU
KERNELS = 20  # shown of a rollout


@dataclass(frozen=True)
class Load:
    """The workload of a step, and the model that is loaded for it, without end-of-sequence ids."""

    policy: Policy
    prompts: int
    prompt_tokens: int
    completions: int  # per prompt
    tokens: int
    rounds: int

    def prompt_ids(self) -> list[list[int]]:
        """Random tokens, different for each prompt."""
        rng = torch.Generator().manual_seed(0)
        return torch.randint(0, 400, (self.prompts, self.prompt_tokens), generator=rng).tolist()

    def groups(self) -> Groups:
        return [(self.prompt_tokens, [self.tokens] * self.completions)] * self.prompts

    def sample(self, engine: LocalEngine, *, index: int = 0) -> Rollout:
        return engine.sample(
            self.prompt_ids(),
            SamplingParams(self.tokens, TEMPERATURE, self.completions),
            uniform=uniforms(0, index, range(self.prompts), self.completions, self.tokens),
        )

    def fused(self, fused: bool = True) -> Policy:
        """The policy on the packed path, with Triton's kernels where there is a GPU."""
        return replace(self.policy, path=PackedPath(fused=fused and self.policy.device.type == "cuda"))


def model_folder(scratch: Path, shape: str, **changes: int) -> str:
    """A model folder of a given shape, with random weights."""
    texts = [message["content"] for style in STYLES for message in prompt(Puzzle((3, 5, 2), 13), style)]
    tokenizer = train_tokenizer(texts, vocabulary=400)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(tie_word_embeddings=True, max_position_embeddings=32_768, **SHAPES[shape] | changes, **ends)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config).bfloat16()
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return str(scratch)


# Rows


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return {**found, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def gap(load: Load, path: str) -> float:
    """The largest difference of a path's log-probabilities from the model's own; raises if it disagrees."""
    policy = selfcheck._on(load.policy, selfcheck.PATHS[path])
    return selfcheck._gap(policy, selfcheck._pieces(policy), checkpointing=False)


def decode(load: Load, *, static: bool, fused: bool) -> dict[str, float]:
    """Milliseconds of a decode step of all rows, and of the prefill."""
    engine = LocalEngine(load.fused(fused), static=static)
    for _ in range(2):  # the first one captures the graph
        seconds = load.sample(engine).seconds
    return {"ms a token": 1000 * seconds["decode"] / (load.tokens - 1), "prefill, ms": 1000 * seconds["prefill"]}


def kernels(load: Load) -> list[tuple[str, int, float]]:
    """The kernels that take most time in a rollout: name, calls, milliseconds."""
    engine = LocalEngine(load.fused(), static=True)
    load.sample(engine)
    with torch.profiler.profile() as profiler:
        load.sample(engine)
    return slowest(profiler.key_averages(), cuda=torch.cuda.is_available())


def slowest(events: Iterable[Any], *, cuda: bool) -> list[tuple[str, int, float]]:
    """The profiler's events with most self time, among those of the device."""
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    taken = "self_device_time_total" if cuda else "self_cpu_time_total"
    there = [event for event in events if event.device_type == device]
    most = sorted(there, key=lambda event: -getattr(event, taken))[:KERNELS]
    return [(str(event.key)[:70], event.count, getattr(event, taken) / 1000) for event in most]


def steps(load: Load, *, fused: bool = True, checkpointing: bool = False, at_once: int = 0) -> dict[str, Any]:
    """Medians by phase, peaks of memory, model FLOP utilization, and what the micro-batch reported."""
    policy, notes = load.fused(fused), list[str]()
    if checkpointing:
        checkpoint_layers(policy.model)
    try:
        rounds = _rounds(load, policy, MicroBatch(at_once, report=notes.append))
    finally:
        if checkpointing:
            policy.model.activation_checkpointing_disable()
    medians = {phase: statistics.median(one[phase] for one in rounds[1:]) for phase in (*PHASES, "total")}
    return {"seconds": medians, "mfu": utilization(load, policy, medians), "notes": notes, **peaks()}


def _rounds(load: Load, policy: Policy, micro_batch: MicroBatch) -> list[Seconds]:
    reference, optimizer = Reference.of(policy), build_optimizer(policy, name="auto", weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    prompts, engine, rounds = load.prompt_ids(), LocalEngine(policy, static=True), list[Seconds]()
    prompt_index = [index for index in range(load.prompts) for _ in range(load.completions)]
    rewards = torch.rand(load.prompts, load.completions, generator=torch.Generator().manual_seed(1))
    objective, clock = Objective(LOSS, TEMPERATURE, load.tokens, clip_grad_norm=0.5), Clock()
    for index in range(load.rounds + 1):
        seconds: Seconds = {}
        with timed(seconds, "total"):
            rollout = load.sample(engine, index=index)
            sequences = Sequences(prompts, rollout.completions, prompt_index)
            with timed(seconds, "reference"):
                ref = reference_logprobs(reference, sequences, temperature=TEMPERATURE, micro_batch=micro_batch)
            with timed(seconds, "update"):
                examples = Examples(sequences, advantages(rewards).flatten(), ref_logprobs=ref)
                update(policy, optimizer, examples, objective, micro_batch=micro_batch, clock=clock)
        seconds |= {**rollout.seconds, "optimizer": clock.lap()["time/optimizer"]}
        seconds["update"] -= seconds["optimizer"]
        rounds.append(seconds)
    return rounds


def capped(load: Load) -> dict[str, Any]:
    """The step in the memory of a smaller GPU: it must retry with smaller micro-batches, and end."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)
    return steps(replace(load, rounds=1), checkpointing=True)


def peaks() -> dict[str, float]:
    """Gigabytes allocated and reserved at most since the row began; of a CPU, resident since the start."""
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak_bytes()
    return {"allocated, GB": peak_bytes() / 1e9, "reserved, GB": reserved / 1e9}


def utilization(load: Load, policy: Policy, seconds: Seconds) -> dict[str, float]:
    """Model FLOP utilization of the update and of the whole step; empty if the operations are not known."""
    known = operations(policy)
    if known is None:
        return {}
    rate, forward = 1e12 * peak_tflops(policy.device, policy.precision), known.forward(load.groups())
    whole = 5 * forward  # sampling, reference and update
    return {"update": 3 * forward / rate / seconds["update"], "total": whole / rate / seconds["total"]}


def rows(load: Load) -> dict[str, Callable[[], Any]]:
    """The work of each row, most knowledge first."""
    return {
        "versions": versions,
        "self-check, fused": partial(gap, load, "fused" if torch.cuda.is_available() else "packed"),
        "self-check, not fused": partial(gap, load, "packed"),
        "decode, graph, fused": partial(decode, load, static=True, fused=True),
        "decode, graph": partial(decode, load, static=True, fused=False),
        "decode, eager": partial(decode, load, static=False, fused=False),
        "kernels of a rollout": partial(kernels, load),
        "step, fused": partial(steps, load),
        "step, not fused": partial(steps, load, fused=False),
        "step, checkpointing, 16 at once": partial(steps, load, checkpointing=True, at_once=16),
        "step, checkpointing, at most 24 GB": partial(capped, load),
    }


def measure(work: Callable[[], Any]) -> dict[str, Any]:
    """The value of a row or why it failed, and its time; memory of the row before is freed first."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        found = {"value": work()}
    except Exception as error:  # whatever a GPU raises: the next row may work
        found = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b" if cuda else "tiny", help="of the model")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=290)
    parser.add_argument("--completions", type=int, default=16, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=160, help="of each completion")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed, after one that is not")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which no row begins")
    parser.add_argument("--out", type=Path, help="write everything as JSON, after each row")
    given = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line does

    start, results = time.perf_counter(), {"asked": str(given)}
    print(table(["row", "seconds", "measured"], []), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(Path(scratch), given.shape)
        loaded = load(folder, device="cuda" if cuda else "cpu", precision="bf16-master" if cuda else "float32")
    policy = replace(loaded, end_ids=(10**6,))
    asked = Load(policy, given.prompts, given.prompt_tokens, given.completions, given.tokens, given.rounds)
    for name, work in rows(asked).items():
        late = time.perf_counter() - start > given.limit
        results[name] = {"failed": "no time left", "seconds": 0} if late else measure(work)
        shown = results[name].get("value", results[name].get("failed"))
        print(f"| {name} | {results[name]['seconds']} | {shown} |", flush=True)
        write(given.out, results)


if __name__ == "__main__":
    main()
