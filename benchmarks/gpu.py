"""Measure the original's workload, with Qwen2.5-1.5B's shape, on one GPU: probes, and training steps by phase.

    python benchmarks/gpu.py --out gpu.json

4 prompts of 290 tokens by 16 completions of 160, bfloat16, 8-bit AdamW, KL to a frozen reference. Weights are random:
speed and memory do not depend on them. Each probe and each variant of a step runs in its own process, which isolates
its peak memory and its failures; `--out` is written after each. Times are medians. Without CUDA, the same code runs a
tiny shape on the CPU, only to show that it works. Predictions made before any measurement are printed beside the
probes.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measured import Seconds, peak_bytes, table, timed, write
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_cli.core.builtin.tokenizer import train_tokenizer
from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import load
from grpo_cli.core.model.logprobs import Entropy
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.perf.utilization import Groups, operations, peak_tflops
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.grpo import advantages
from grpo_cli.core.rl.state import build_optimizer
from grpo_cli.core.rl.update import Objective, reference_logprobs, update
from grpo_cli.core.rollout.engine import uniforms
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


@dataclass(frozen=True)
class Load:
    """The workload of a step."""

    folder: str
    device: str
    prompts: int
    prompt_tokens: int
    completions: int  # per prompt
    tokens: int
    rounds: int

    def prompt_ids(self) -> list[list[int]]:
        """Random tokens, different for each prompt."""
        rng = torch.Generator().manual_seed(0)
        return torch.randint(0, 400, (self.prompts, self.prompt_tokens), generator=rng).tolist()

    def policy(self, precision: str) -> Policy:
        """A policy without end-of-sequence ids, so all completions have full length."""
        return replace(load(self.folder, device=self.device, precision=precision), end_ids=(10**6,))

    def groups(self) -> Groups:
        return [(self.prompt_tokens, [self.tokens] * self.completions)] * self.prompts


@dataclass(frozen=True)
class Variant:
    """A configuration of the step."""

    name: str
    precision: str = "bf16"
    static: bool = True
    padded: bool = False
    gradient_checkpointing: bool = False
    fused: bool = True  # on a GPU
    at_once: int = 0  # completions in a micro-batch


VARIANTS = (
    Variant("graph, shared prefix, bf16"),
    Variant("the same, bf16-master", precision="bf16-master"),
    Variant("without fused kernels", fused=False),
    Variant("eager decoding", static=False),
    Variant("rows padded, each with its prompt", padded=True, at_once=16),
    Variant("gradient checkpointing", gradient_checkpointing=True),
)


class Padded(PackedPath):
    """Baseline log-probabilities: every row contains its prompt and is padded to one length."""

    def logprobs(
        self, policy: Policy, sequences: Sequences, *, temperature: float, entropy: Entropy, logit_chunk: int
    ) -> tuple[Tensor, Tensor]:
        completions = sequences.completions
        rows = [sequences.prompts[owner] + row for owner, row in zip(sequences.prompt_index, completions, strict=True)]
        assert len(set(map(len, rows))) == 1 == len(set(map(len, completions)))
        tokens, length = torch.tensor(rows, device=policy.device), len(completions[0])
        attention = policy.model.config._attn_implementation
        policy.model.set_attn_implementation("sdpa")
        logits = policy.model(input_ids=tokens, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        policy.model.set_attn_implementation(attention)
        everything = (logits.float() / temperature).log_softmax(dim=-1)  # (B, T, V)
        spread = -(everything.detach().exp() * everything.detach()).sum(dim=-1)
        return everything.gather(-1, tokens[:, -length:, None])[..., 0], spread


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


# Steps


def steps(asked: Load, variant: Variant) -> dict[str, Any]:
    """Medians by phase, peak memory, and model FLOP utilization."""
    policy = asked.policy(variant.precision)
    fused = policy.path == PackedPath(fused=True) and variant.fused
    policy = replace(policy, path=PackedPath(fused=fused))
    if variant.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
        policy.model.train()
    if variant.padded:
        policy = replace(policy, path=Padded())
    reference = Reference.of(policy)
    notes: list[str] = []
    name = "adamw8bit"
    if not importlib.util.find_spec("bitsandbytes"):
        name = "adamw"
        notes.append("AdamW in float32, since bitsandbytes is missing")
    optimizer = build_optimizer(policy, name=name, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    prompts, fit = asked.prompt_ids(), MicroBatch(variant.at_once, report=notes.append)
    prompt_index = [index for index in range(asked.prompts) for _ in range(asked.completions)]
    rewards = torch.rand(asked.prompts, asked.completions, generator=torch.Generator().manual_seed(1))
    rounds: list[Seconds] = []
    engine = LocalEngine(policy)
    for index in range(asked.rounds + 1):
        seconds: Seconds = {}
        with timed(seconds, "total"):
            rollout = engine.sample(
                prompts,
                SamplingParams(asked.tokens, TEMPERATURE, asked.completions),
                uniform=uniforms(0, index, range(asked.prompts), asked.completions, asked.tokens),
                static=variant.static,
            )
            seconds |= rollout.seconds
            sequences = Sequences(prompts, rollout.completions, prompt_index)
            with timed(seconds, "reference"):
                ref_logprobs = reference_logprobs(reference, sequences, temperature=TEMPERATURE, micro_batch=fit)
            with timed(seconds, "update"):
                examples = Examples(sequences, advantages(rewards).flatten(), ref_logprobs=ref_logprobs)
                objective = Objective(LOSS, TEMPERATURE, asked.tokens, clip_grad_norm=0.5)
                clock = Clock()
                update(policy, optimizer, examples, objective, micro_batch=fit, clock=clock)
        seconds["optimizer"] = clock.lap()["time/optimizer"]
        seconds["update"] -= seconds["optimizer"]
        rounds.append(seconds)
    medians = {phase: statistics.median(one[phase] for one in rounds[1:]) for phase in (*PHASES, "total")}
    return {"seconds": medians, "peak": peak_bytes(), "mfu": utilization(asked, policy, medians), "notes": notes}


def utilization(asked: Load, policy: Policy, seconds: Seconds) -> dict[str, float]:
    """Model FLOP utilization of the update and of the whole step; empty if the operations are not known."""
    known = operations(policy)
    if known is None:
        return {}
    rate, forward = 1e12 * peak_tflops(policy.device, policy.precision), known.forward(asked.groups())
    whole = known.sample(asked.groups()) + 4 * forward  # reference and update
    return {"update": 3 * forward / rate / seconds["update"], "total": whole / rate / seconds["total"]}


# Probes


def kernel(asked: Load, *, masked: bool, backward: bool) -> str:
    """The kernel that takes most time in attention of a group's completions to their prompt and themselves."""
    heads, key_value_heads, width, longest = 12, 2, 128, asked.prompt_tokens + asked.tokens
    device, dtype = torch.device(asked.device), torch.bfloat16
    query, key, value = (
        torch.randn(asked.completions, count, tokens, width, device=device, dtype=dtype, requires_grad=True)
        for count, tokens in ((heads, asked.tokens), (key_value_heads, longest), (key_value_heads, longest))
    )
    bias: Tensor = causal_lower_right(asked.tokens, longest)
    if masked:
        bias = torch.zeros(asked.completions, 1, asked.tokens, longest, device=device, dtype=dtype)

    def attend() -> None:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        if backward:
            attended.sum().backward()

    torch.backends.cuda.enable_cudnn_sdp(False)  # as `load` does
    attend()  # warm-up
    return slowest_kernel(attend, cuda=asked.device == "cuda")


def slowest_kernel(work: Callable[[], None], *, cuda: bool) -> str:
    """The kernel that takes most time in `work`: on CUDA, among the device's kernels."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    return slowest_of(profiler.key_averages(), cuda=cuda)


def slowest_of(events: Iterable[Any], *, cuda: bool) -> str:
    """The name of the profiler's event with most self time, among the device's."""
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    there = [event for event in events if event.device_type == device]
    slowest = max(there, key=lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total)
    return str(slowest.key)[:60]


def decode_milliseconds(asked: Load, *, static: bool) -> str:
    """Milliseconds of one decode step of all rows."""
    engine, prompts = LocalEngine(asked.policy("bf16")), asked.prompt_ids()
    uniform = uniforms(0, 0, range(asked.prompts), asked.completions, asked.tokens)
    for _ in range(2):  # the first one captures the graph
        rollout = engine.sample(
            prompts,
            SamplingParams(asked.tokens, TEMPERATURE, asked.completions),
            uniform=uniform,
            static=static,
        )
    return f"{1000 * rollout.seconds['decode'] / (asked.tokens - 1):.2f}"


def probes(asked: Load) -> dict[str, Callable[[], str]]:
    works: dict[str, Callable[[], str]] = {
        f"{name}, ms a token": partial(decode_milliseconds, asked, static=name == "graph")
        for name in ("eager", "graph")
    }
    for masked, backward in ((False, False), (False, True), (True, False), (True, True)):
        name = f"{'masked' if masked else 'aligned'}, {'forward and backward' if backward else 'forward'}"
        works[name] = partial(kernel, asked, masked=masked, backward=backward)
    return works


PREDICTED = {
    "eager, ms a token": "25: launching kernels",
    "graph, ms a token": "2 to 3; reading the weights takes 0.9",
    "aligned, forward": "flash, which shares keys among query heads",
    "aligned, forward and backward": "flash",
    "masked, forward": "none that is fused takes a mask and shared keys: plain products",
    "masked, forward and backward": "plain products",
}


# In processes of their own


class Failed(Exception):
    """Why there is no result: the work raised, its process ended, or it timed out."""


def _child(connection: Connection, work: Callable[[], object]) -> None:
    try:
        connection.send((work(), None))
    except Exception as error:
        traceback.print_exc()
        connection.send((None, " ".join(f"{type(error).__name__}: {error}".split())[:200]))


def apart(work: Callable[[], Any], *, limit: float = 600) -> Any:
    """Run `work` in a fresh process and return its result; raises Failed after `limit` seconds."""
    processes = multiprocessing.get_context("spawn")
    connection, theirs = processes.Pipe()
    process = processes.Process(target=_child, args=(theirs, work))
    process.start()
    theirs.close()
    try:
        if not connection.poll(limit):
            process.kill()
            raise Failed(f"cut off after {limit:g} s")
        result, problem = connection.recv()
    except EOFError:
        raise Failed("its process died") from None
    finally:
        process.join()
    if problem is not None:
        raise Failed(f"failed: {problem}")
    return result


def trl(asked: Load) -> dict[str, Any]:
    """TRL's GRPOTrainer with transformers' generation: bfloat16 weights, 8-bit AdamW, its default checkpointing."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = asked.prompts * asked.completions
    seconds: list[Seconds] = []

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def training_step(self, *arguments: object, **options: object) -> object:
            seconds.append({})
            with timed(seconds[-1], "total"):
                return super().training_step(*arguments, **options)

        def _generate_single_turn(self, prompts: list[list[int]], *arguments: object, **options: object) -> object:
            with timed(seconds[-1], "decode"):
                return super()._generate_single_turn(ids, *arguments, **options)

    ids = [prompt for prompt in asked.prompt_ids() for _ in range(asked.completions)]
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=asked.rounds + 1,
        per_device_train_batch_size=rows,
        num_generations=asked.completions,
        max_completion_length=asked.tokens,
        generation_kwargs={"eos_token_id": 10**6},
        temperature=TEMPERATURE,
        beta=LOSS.beta,
        learning_rate=LEARNING_RATE,
        optim="adamw_bnb_8bit",
        model_init_kwargs={"dtype": "bfloat16"},
        bf16=asked.device == "cuda",
        use_cpu=asked.device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Timed(
        model=asked.folder,
        reward_funcs=lambda completions, **_: [len(turns[0]["content"]) / 1000 for turns in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "."}]} for _ in range(asked.prompts)]),
    )
    trainer.eos_token_ids = [10**6]
    trainer.train()
    return {"seconds": {"total": statistics.median(one["total"] for one in seconds[1:])}, "peak": peak_bytes()}


def row(name: str, found: dict[str, Any], best: float) -> list[str]:
    """Table cells of a variant: seconds by phase and in total, utilization, memory."""
    seconds, used = found["seconds"], found.get("mfu", {})
    times = [f"{seconds[phase]:.3f}" if phase in seconds else "" for phase in PHASES]
    shares = [f"{used[phase]:.0%}" if phase in used else "" for phase in ("update", "total")]
    total = f"{seconds['total']:.3f} ({seconds['total'] / best:.1f}x)"
    notes = "; ".join(found.get("notes", []))
    return [name, *times, total, *shares, f"{found['peak'] / 1e9:.1f}", notes]


HEAD = ["seconds", *PHASES, "total (times the first)", "MFU of the update", "of the step", "peak, GB", "notes"]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b" if cuda else "tiny", help="of the model")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=290)
    parser.add_argument("--completions", type=int, default=16, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=160, help="of each completion")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed, after one that is not")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each probe and variant")
    parser.add_argument("--out", type=Path, help="write everything as JSON, after each row")
    given = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line does

    results: dict[str, Any] = {}

    def taken(name: str, work: Callable[[], Any]) -> Any:
        """The result of a row, kept and written; None, with the reason kept, if there is none."""
        try:
            results[name] = apart(work, limit=given.limit)
        except Failed as problem:
            results[name] = {"failed": str(problem)}
        # In its own process: querying a GPU uses its memory.
        apart(partial(write, given.out, {"asked": str(given), **results}))
        return None if isinstance(results[name], dict) and "failed" in results[name] else results[name]

    with tempfile.TemporaryDirectory() as scratch:
        folder = apart(partial(model_folder, Path(scratch), given.shape))
        asked = Load(
            folder, "cuda" if cuda else "cpu", given.prompts, given.prompt_tokens, given.completions, given.tokens,
            given.rounds,
        )  # fmt: skip
        print("| probe | predicted | measured |\n| --- | --- | --- |")
        for name, probe in probes(asked).items():
            value = taken(name, probe)
            print(f"| {name} | {PREDICTED[name]} | {value or results[name]['failed']} |", flush=True)
        print()
        works: dict[str, Callable[[], Any]] = {one.name: partial(steps, asked, one) for one in VARIANTS}
        if importlib.util.find_spec("trl"):
            works["TRL"] = partial(trl, asked)
        print(table(HEAD, []), flush=True)
        best = 0.0
        for name, work in works.items():
            measured = taken(name, work)
            best = best or (measured["seconds"]["total"] if measured else 0.0)
            cells = row(name, measured, best) if measured else [name, results[name]["failed"]]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
