"""Time of one training step beside TRL's GRPOTrainer, and of sampling beside transformers' `generate`.

    python benchmarks/step.py --rounds 7 --out step.json

Everybody has the same weights, the same one-shot prompts and exactly as many new tokens, because no end-of-sequence
id can be sampled; KL penalty, one inner update, AdamW. Each contestant has a process of its own, so that none runs
under another's settings, and they take turns, so that a change in the machine's load meets all of them. Figures are
medians; TRL's update includes its scoring.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import GenerationConfig

from grpo_cli.core.builtin.recipe import Recipe, build_model, build_tokenizer
from grpo_cli.core.grpo import advantages, reference_logprobs, update
from grpo_cli.core.policy import BUILTIN, Policy, Sequences, detect_precision, load
from grpo_cli.core.puzzle import enumerate_puzzles
from grpo_cli.core.rollout import draws, sample
from grpo_cli.core.settings import Loss
from grpo_cli.core.task import Style, prompt

IMPOSSIBLE = 10**6  # an end-of-sequence id that no model samples
TEMPERATURE, BETA, LEARNING_RATE = 1.0, 0.01, 1e-5
PHASES = ("rollout", "reference", "update", "total")
SHAPES = ((4, 16, 160), (16, 8, 320), (64, 1, 320), (1, 1, 320))  # prompts, completions of each, new tokens
Seconds = dict[str, float]
Conversation = list[dict[str, str]]


def reward(text: str) -> float:
    """Anything that differs between completions."""
    return len(set(text)) / 100


def model_folder(scratch: Path) -> Path:
    """The built-in model, or a random one of its shape."""
    if BUILTIN.is_dir():
        return BUILTIN
    tokenizer = build_tokenizer(Recipe())
    build_model(Recipe(), tokenizer).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return scratch


def policy_of(folder: Path, precision: str) -> Policy:
    loaded = load(str(folder), device="cpu", precision=precision)
    return Policy(loaded.model, loaded.tokenizer, loaded.name, loaded.precision, (IMPOSSIBLE,))


def conversations(count: int, style: Style) -> list[Conversation]:
    puzzles = list(enumerate_puzzles(numbers=3, split="train"))
    return [prompt(puzzle, style) for puzzle in puzzles[:: len(puzzles) // count][:count]]


@contextmanager
def timed(seconds: Seconds, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def our_step(
    folder: Path, precision: str, chats: list[Conversation], shape: argparse.Namespace
) -> Callable[[], Seconds]:
    """A function that takes one training step of ours."""
    policy = policy_of(folder, precision)
    reference = policy.frozen_copy()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE)
    loss = Loss(loss_type="dapo", beta=BETA, epsilon=0.2, epsilon_high=0.2, kl_estimator="k3", scale_rewards="group")
    owners = [index for index in range(shape.prompts) for _ in range(shape.completions)]

    def step() -> Seconds:
        seconds: Seconds = {}
        with timed(seconds, "total"):
            with timed(seconds, "rollout"):
                prompts = [policy.encode(chat) for chat in chats]
                rollout = sample(
                    policy,
                    prompts,
                    num_generations=shape.completions,
                    max_new_tokens=shape.tokens,
                    temperature=TEMPERATURE,
                    uniform=draws(0, 0, range(shape.prompts), shape.completions, shape.tokens),
                )
            assert all(rollout.truncated)
            rewards = torch.tensor([reward(policy.decode(tokens)) for tokens in rollout.completions])
            sequences = Sequences(prompts, rollout.completions, owners)
            with timed(seconds, "reference"):
                ref_logprobs = reference_logprobs(reference, sequences, temperature=TEMPERATURE)
            with timed(seconds, "update"):
                update(
                    policy,
                    optimizer,
                    sequences,
                    advantages(rewards.view(shape.prompts, -1)).flatten(),
                    loss=loss,
                    temperature=TEMPERATURE,
                    max_new_tokens=shape.tokens,
                    ref_logprobs=ref_logprobs,
                )
        return seconds

    return step


def generate_rollout(
    folder: Path, precision: str, chats: list[Conversation], completions: int, tokens: int
) -> Callable[[], Seconds]:
    """A function that samples the same completions with transformers' `generate`."""
    from transformers import AutoModelForCausalLM

    policy = policy_of(folder, precision)
    model = AutoModelForCausalLM.from_pretrained(folder)
    policy.tokenizer.padding_side = "left"
    settings = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        eos_token_id=IMPOSSIBLE,
        pad_token_id=policy.tokenizer.pad_token_id,
    )

    def rollout() -> Seconds:
        seconds: Seconds = {}
        with timed(seconds, "rollout"), policy.autocast():
            rows = [policy.encode(chat) for chat in chats for _ in range(completions)]
            batch = policy.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            found = model.generate(**batch, generation_config=settings)
        assert found.shape == (len(rows), batch["input_ids"].shape[1] + tokens)
        return seconds

    return rollout


def our_rollout(
    folder: Path, precision: str, chats: list[Conversation], completions: int, tokens: int
) -> Callable[[], Seconds]:
    policy = policy_of(folder, precision)

    def rollout() -> Seconds:
        seconds: Seconds = {}
        with timed(seconds, "rollout"):
            sample(
                policy,
                [policy.encode(chat) for chat in chats],
                num_generations=completions,
                max_new_tokens=tokens,
                temperature=TEMPERATURE,
                uniform=draws(0, 0, range(len(chats)), completions, tokens),
            )
        return seconds

    return rollout


def run_trl(
    folder: Path,
    precision: str,
    chats: list[Conversation],
    shape: argparse.Namespace,
    turn: Callable[[Seconds], None],
) -> None:
    """Train with TRL for a round of warm-up and `shape.rounds` more, calling `turn` after each with its seconds."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: Seconds = {}

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.clear()
            seconds["start"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["total"] = time.perf_counter() - seconds.pop("start")
            seconds["update"] = seconds["total"] - seconds["rollout"] - seconds["reference"]
            turn(dict(seconds))

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
            with timed(seconds, "rollout"):
                return super()._generate_single_turn(*args, **options)

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            with timed(seconds, "policy" if torch.is_grad_enabled() else "reference"):
                return super()._get_per_token_logps_and_entropies(*args, **options)

    rows = shape.prompts * shape.completions
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=shape.rounds + 1,
        per_device_train_batch_size=rows,
        num_generations=shape.completions,
        max_completion_length=shape.tokens,
        generation_kwargs={"eos_token_id": IMPOSSIBLE},
        temperature=TEMPERATURE,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        activation_checkpointing=False,
        bf16=precision == "bf16-master",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Timed(
        model=str(folder),
        reward_funcs=lambda completions, **_: [reward(turns[0]["content"]) for turns in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats]),
        callbacks=[Turns()],
    )
    trainer.eos_token_ids = [IMPOSSIBLE]
    trainer.train()


def contend(
    connection: Connection,
    name: str,
    folder: Path,
    precision: str,
    chats: list[Conversation],
    shape: argparse.Namespace,
) -> None:
    """Take a step for each message that comes in, and send back its seconds."""

    def turn(seconds: Seconds) -> None:
        connection.send(seconds)
        connection.recv()

    connection.recv()
    if name == "TRL":
        run_trl(folder, precision, chats, shape, turn)
        return
    if name == "countdown":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as its command line does
        step = our_step(folder, precision, chats, shape)
    else:
        step = generate_rollout(folder, precision, chats, shape.completions, shape.tokens)
    for _ in range(shape.rounds + 1):
        turn(step())


def measure_steps(folder: Path, shape: argparse.Namespace, precisions: list[str]) -> dict[str, list[Seconds]]:
    """Seconds by contestant, a dictionary for each round; the first round warms up and is left out."""
    chats = conversations(shape.prompts, "one-shot")
    found: dict[str, list[Seconds]] = {}
    processes = multiprocessing.get_context("spawn")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("steps", total=len(precisions) * (shape.rounds + 1))
        for precision in precisions:
            started = {}
            for name in ("TRL", "countdown", "generate"):
                connection, theirs = processes.Pipe()
                arguments = (theirs, name, folder, precision, chats, shape)
                process = processes.Process(target=contend, args=arguments, daemon=True)
                process.start()
                theirs.close()  # so that a process that dies ends this one too
                started[name] = (process, connection)
            for _ in range(shape.rounds + 1):
                for name, (_, connection) in started.items():
                    connection.send(True)
                    found.setdefault(f"{name} {precision}", []).append(connection.recv())
                progress.advance(task)
            for process, connection in started.values():
                connection.send(True)
                process.join()
    return {name: rounds[1:] for name, rounds in found.items()}


def measure_rollouts(folder: Path, rounds: int, precisions: list[str]) -> dict[str, dict[str, list[Seconds]]]:
    """Seconds of sampling by shape and contestant, ours and `generate` in turn."""
    found: dict[str, dict[str, list[Seconds]]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for prompts, completions, tokens in progress.track(SHAPES, description="shapes"):
            chats = conversations(prompts, "one-shot")
            for precision in precisions:
                arguments = (folder, precision, chats, completions, tokens)
                contestants = {"countdown": our_rollout(*arguments), "generate": generate_rollout(*arguments)}
                taken: dict[str, list[Seconds]] = {name: [] for name in contestants}
                for _ in range(rounds + 1):
                    for name, rollout in contestants.items():
                        taken[name].append(rollout())
                found[f"{prompts} x {completions}, {tokens} tokens, {precision}"] = {
                    name: seconds[1:] for name, seconds in taken.items()
                }
    return found


def medians(rounds: list[Seconds]) -> Seconds:
    return {phase: statistics.median(seconds[phase] for seconds in rounds) for phase in PHASES if phase in rounds[0]}


def steps_table(found: dict[str, list[Seconds]], shape: argparse.Namespace) -> Table:
    """Medians by phase, with each contestant's ratio to ours of the same precision."""
    title = f"{shape.prompts} x {shape.completions} completions of {shape.tokens} tokens, seconds (times ours)"
    table = Table("", *PHASES, title=title)
    for name, rounds in found.items():
        ours = medians(found[f"countdown {name.split()[1]}"])
        cells = [
            f"{value:.2f} ({value / ours[phase]:.1f}x)" if phase in medians(rounds) else "-"
            for phase in PHASES
            for value in [medians(rounds).get(phase, 0.0)]
        ]
        table.add_row(name, *cells)
    return table


def rollouts_table(found: dict[str, dict[str, list[Seconds]]]) -> Table:
    table = Table("prompts x completions", "countdown", "generate", "ratio", title="sampling, seconds")
    for shape, contestants in found.items():
        ours, theirs = (medians(contestants[name])["rollout"] for name in ("countdown", "generate"))
        table.add_row(shape, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed, after one that is not")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=16, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=160, help="new tokens of each completion")
    parser.add_argument("--precision", choices=("float32", "bf16-master"), action="append", help="both by default")
    parser.add_argument("--rollouts", action="store_true", help="time sampling alone, in the shapes of training")
    parser.add_argument("--out", type=Path, help="write every round as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

    fastest = detect_precision("auto", torch.device("cpu"))
    precisions = arguments.precision or sorted({"float32", fastest}, reverse=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(Path(scratch))
        console = Console()
        found: dict[str, Any]
        if arguments.rollouts:
            found = measure_rollouts(folder, arguments.rounds, precisions)
            console.print(rollouts_table(found))
        else:
            found = measure_steps(folder, arguments, precisions)
            console.print(steps_table(found, arguments))
    if arguments.out:
        arguments.out.write_text(json.dumps({"threads": torch.get_num_threads(), "seconds": found}, indent=1))


if __name__ == "__main__":
    main()
