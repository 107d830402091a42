"""Time of a training step compared with TRL's GRPOTrainer and with plain transformers code.

    python benchmarks/step.py --rounds 9 --out step.json    completions end by themselves, as in training
    python benchmarks/step.py --ends none                   all completions have the same length
    python benchmarks/step.py --rollouts                    sampling only, in the shapes of training and evaluation
    python benchmarks/step.py --check                       fail if a phase has lost its lead over `plain`

All implementations use the same weights, one-shot prompts and end-of-sequence ids, sample at temperature 1, and take
one AdamW update with a KL penalty. `plain` uses `generate`, a forward pass over left-padded rows, log-softmax and
gather. Each implementation runs in its own process, with its own settings, and they take turns, so a change in the
machine's load affects all. Times are medians over the rounds. The learning rate is too small to move a weight, so all
rounds sample from one distribution; lengths differ only by chance, and are shown. TRL's update includes its scoring.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measured import Seconds, peak_bytes, table, timed, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import BUILTIN, detect_precision, load
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.grpo import advantages, batch_loss, normalizer
from grpo_cli.core.rl.update import Objective, reference_logprobs, update
from grpo_cli.core.rollout.engine import uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.data import generate
from grpo_cli.core.task.prompts import prompt

IMPOSSIBLE = 10**6  # an end-of-sequence id that is never sampled
TEMPERATURE, BETA, LEARNING_RATE = 1.0, 0.01, 1e-12
LOSS = resolve().settings.loss.model_copy(update={"loss_type": "dapo", "beta": BETA, "scale_rewards": "group"})
PHASES = ("rollout", "reference", "update", "total")
RECORDED = {"rollout": 2.3, "reference": 1.75, "update": 1.65}  # lead over `plain`, of --check on two cores
SLOWER = 1.3  # allowed by the check
SHAPES = ((4, 16, 160), (16, 8, 360), (64, 1, 360), (1, 1, 360))  # prompts, completions per prompt, most new tokens
Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Work:
    """The workload of every implementation."""

    folder: str
    precision: str
    prompts: int
    completions: int  # per prompt
    tokens: int  # limit per completion
    ends: str  # natural: by the model's own end-of-sequence ids; none: never before `tokens`
    whole: bool  # a whole training step, or only its rollout
    rounds: int
    micro_batch: int = 0  # completions per forward pass, 0 for all
    peer_micro_batch: int = 0  # of the other implementations, which take more memory for each
    numbers: int = 3  # in each puzzle
    of_processor: bool = False  # seconds of the processor, instead of the clock

    @property
    def timed(self) -> Callable[[Seconds, str], AbstractContextManager[None]]:
        return partial(timed, clock=time.process_time if self.of_processor else time.perf_counter)

    @property
    def rows(self) -> range:
        return range(self.prompts * self.completions)

    @property
    def prompt_index(self) -> list[int]:
        return [index for index in range(self.prompts) for _ in range(self.completions)]


@dataclass(frozen=True)
class Round:
    """Times and samples of one step."""

    seconds: Seconds
    tokens: int
    longest: int
    peak: int  # peak bytes of its process so far


Turn = Callable[[Round], None]


def reward(text: str) -> float:
    """A reward that differs between completions."""
    return len(set(text)) / 100


def advantages_of(work: Work, texts: list[str]) -> Tensor:
    """(B,)"""
    return advantages(torch.tensor([reward(text) for text in texts]).view(work.prompts, -1)).flatten()


def policy_of(work: Work) -> Policy:
    loaded = load(work.folder, device="cpu", precision=work.precision)
    return loaded if work.ends == "natural" else replace(loaded, end_ids=(IMPOSSIBLE,))


def conversations(work: Work) -> list[Conversation]:
    """One-shot prompts."""
    puzzles = generate(work.prompts, numbers=work.numbers, split="train")
    return [prompt(puzzle, "one-shot") for puzzle in puzzles]


def round_of(seconds: Seconds, completions: list[list[int]]) -> Round:
    lengths = [len(completion) for completion in completions]
    return Round(dict(seconds), sum(lengths), max(lengths), peak_bytes())


# Contestants


def countdown(work: Work, turn: Turn) -> None:
    """A step of this package."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
    policy = policy_of(work)
    reference = Reference.of(policy)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE)
    chats, engine, micro_batch = conversations(work), LocalEngine(policy), MicroBatch(work.micro_batch)
    for index in range(work.rounds + 1):
        seconds: Seconds = {}
        with work.timed(seconds, "total"):
            with work.timed(seconds, "rollout"):
                prompts = [policy.encode(chat) for chat in chats]
                rollout = engine.sample(
                    prompts,
                    SamplingParams(work.tokens, TEMPERATURE, work.completions),
                    uniform=uniforms(0, index, range(work.prompts), work.completions, work.tokens),
                )
            seconds |= rollout.seconds
            if work.whole:
                sequences = Sequences(prompts, rollout.completions, work.prompt_index)
                advantage = advantages_of(work, [policy.decode(tokens) for tokens in rollout.completions])
                with work.timed(seconds, "reference"):
                    ref_logprobs = reference_logprobs(
                        reference, sequences, temperature=TEMPERATURE, micro_batch=micro_batch
                    )
                with work.timed(seconds, "update"):
                    examples = Examples(sequences, advantage, ref_logprobs=ref_logprobs)
                    objective = Objective(LOSS, TEMPERATURE, work.tokens)
                    update(policy, optimizer, examples, objective, micro_batch=micro_batch)
        turn(round_of(seconds, rollout.completions))


def plain(work: Work, turn: Turn) -> None:
    """A step of plain transformers code."""
    policy = policy_of(work)
    model, reference = (AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rows = [policy.encode(chat) for chat in conversations(work) for _ in range(work.completions)]
    torch.manual_seed(0)
    for _ in range(work.rounds + 1):
        seconds: Seconds = {}
        with work.timed(seconds, "total"), policy.autocast():
            with work.timed(seconds, "rollout"):
                completions = generated(policy, model, rows, work.tokens)
            if work.whole:
                advantage = advantages_of(work, [policy.decode(tokens) for tokens in completions])
                lengths = torch.tensor([len(tokens) for tokens in completions])
                weight = normalizer(lengths, loss_type=LOSS.loss_type, max_new_tokens=work.tokens)
                chunks = MicroBatch(work.peer_micro_batch).split(work.rows)
                with work.timed(seconds, "reference"), torch.no_grad():
                    ref_logprobs = [padded_logprobs(reference, rows, completions, chunk)[0] for chunk in chunks]
                with work.timed(seconds, "update"):
                    for chunk, ref in zip(chunks, ref_logprobs, strict=True):
                        logprobs, mask = padded_logprobs(model, rows, completions, chunk)
                        old = logprobs.detach()
                        loss, *_ = batch_loss(logprobs, old, ref, advantage[chunk], mask, weight[chunk], LOSS)
                        loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        turn(round_of(seconds, completions))


def generated(policy: Policy, model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """A completion of each prompt by transformers' `generate`, up to its end-of-sequence id."""
    policy.tokenizer.padding_side = "left"
    batch = policy.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    settings = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        eos_token_id=list(policy.end_ids),
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    found = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :].tolist()
    ends = [[place for place, token in enumerate(row) if token in policy.end_ids] for row in found]
    return [row[: places[0] + 1] if places else row for row, places in zip(found, ends, strict=True)]


def padded_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], chosen: list[int]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the chosen completions' tokens and which are real (B, T), aligned on the right."""
    rows = [prompts[row] + completions[row] for row in chosen]
    lengths = torch.tensor([len(completions[row]) for row in chosen])
    longest, most = max(map(len, rows)), int(lengths.max())
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(tokens, attention_mask=attention_mask, position_ids=positions, logits_to_keep=most + 1)
    everything = (output.logits[:, :-1].float() / TEMPERATURE).log_softmax(dim=-1)  # (B, T, V)
    mask = torch.arange(most) >= most - lengths[:, None]
    return everything.gather(-1, tokens[:, -most:, None])[..., 0] * mask, mask


def trl(work: Work, turn: Turn) -> None:
    """TRL's GRPOTrainer on transformers' own generation."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about TRL's calls
    policy = policy_of(work)
    chats = conversations(work)
    expected = sorted(policy.encode(chat) for chat in chats for _ in range(work.completions))
    seconds: Seconds = {}
    sampled: list[list[int]] = []

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.clear()
            seconds["start"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["total"] = time.perf_counter() - seconds.pop("start")
            seconds["update"] = seconds["total"] - seconds["rollout"] - seconds["reference"]
            turn(round_of(seconds, sampled))

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompts: list[list[int]], *args: Any, **options: Any) -> Any:
            assert sorted(prompts) == expected
            with timed(seconds, "rollout"):
                completions, logprobs = super()._generate_single_turn(prompts, *args, **options)
            sampled[:] = completions
            return completions, logprobs

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            with timed(seconds, "policy" if torch.is_grad_enabled() else "reference"):
                return super()._get_per_token_logps_and_entropies(*args, **options)

    rows = work.peer_micro_batch or len(work.rows)
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=work.rounds + 1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(work.rows) // rows,
        num_generations=work.completions,
        max_completion_length=work.tokens,
        generation_kwargs={} if work.ends == "natural" else {"eos_token_id": IMPOSSIBLE},
        temperature=TEMPERATURE,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        activation_checkpointing=False,
        bf16=work.precision == "bf16-master",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Timed(
        model=work.folder,
        reward_funcs=lambda completions, **_: [reward(turns[0]["content"]) for turns in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats]),
        callbacks=[Turns()],
    )
    trainer.remove_callback(PrinterCallback)
    if work.ends == "none":
        trainer.eos_token_ids = [IMPOSSIBLE]
    assert set(trainer.eos_token_ids) == set(policy.end_ids)
    trainer.train()


CONTESTANTS: dict[str, Callable[[Work, Turn], None]] = {"TRL": trl, "plain": plain, "countdown": countdown}


# Measuring


def contend(connection: Connection, name: str, work: Work) -> None:
    """Run a step for each incoming message and send it back."""

    def turn(done: Round) -> None:
        connection.send(done)
        connection.recv()

    connection.recv()
    CONTESTANTS[name](work, turn)


def measure(work: Work, names: list[str], advance: Callable[[], None] = lambda: None) -> dict[str, list[Round]]:
    """The rounds of each implementation, without a warm-up round."""
    processes = multiprocessing.get_context("spawn")
    started = {}
    for name in names:
        connection, theirs = processes.Pipe()
        process = processes.Process(target=contend, args=(theirs, name, work))  # not a daemon: loading starts a process
        process.start()
        theirs.close()  # so a dying child ends the parent's read
        started[name] = (process, connection)
    found: dict[str, list[Round]] = {name: [] for name in names}
    for _ in range(work.rounds + 1):
        for name, (_, connection) in started.items():
            connection.send(True)
            found[name].append(connection.recv())
        advance()
    for process, connection in started.values():
        connection.send(True)
        process.join()
    return {name: rounds[1:] for name, rounds in found.items()}


@dataclass(frozen=True)
class Summary:
    """Medians over an implementation's rounds; the mean length is over all of them."""

    seconds: Seconds
    tokens_per_second: float  # of the rollout
    mean_length: float
    longest: float
    peak: int


def summarize(rounds: list[Round], rows: int) -> Summary:
    return Summary(
        {phase: statistics.median(one.seconds[phase] for one in rounds) for phase in rounds[0].seconds},
        statistics.median(one.tokens / one.seconds["rollout"] for one in rounds),
        sum(one.tokens for one in rounds) / len(rounds) / rows,
        statistics.median(one.longest for one in rounds),
        rounds[-1].peak,
    )


def rows_of(work: Work, found: dict[str, Summary]) -> Iterator[list[str]]:
    """Table cells: each implementation's medians, with their ratios to ours."""
    ours = found["countdown"]
    for name, summary in found.items():
        times = [
            f"{summary.seconds[phase]:.2f} ({summary.seconds[phase] / ours.seconds[phase]:.1f}x)"
            for phase in PHASES
            if phase in summary.seconds
        ]
        speed = f"{summary.tokens_per_second:,.0f} ({summary.tokens_per_second / ours.tokens_per_second:.2f}x)"
        shape = f"{work.prompts} x {work.completions} x {work.tokens}"
        lengths = [f"{summary.mean_length:.0f}", f"{summary.longest:g}"]
        yield [shape, f"{name}, {work.precision}", *times, speed, *lengths, f"{summary.peak / 2**30:.1f}"]


def check(work: Work) -> None:
    """Exit with an error unless every phase keeps its lead over plain transformers code."""
    for _ in range(2):
        rounds = measure(work, ["plain", "countdown"])
        plain, ours = (summarize(rounds[name], len(work.rows)).seconds for name in rounds)
        leads = {phase: plain[phase] / ours[phase] for phase in RECORDED}
        lost = [phase for phase, lead in leads.items() if lead < RECORDED[phase] / SLOWER]
        print(", ".join(f"{phase} {lead:.2f}x (recorded {RECORDED[phase]:.2f}x)" for phase, lead in leads.items()))
        if not lost:
            return
    raise SystemExit(f"slower than recorded, relative to plain transformers code: {', '.join(lost)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed, after one that is not")
    parser.add_argument("--ends", choices=("natural", "none"), default="natural", help="what ends a completion")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=16, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=160, help="most new tokens of a completion")
    help_precision = "the fastest one and float32 by default"
    parser.add_argument("--micro-batch", type=int, default=0, help="our completions per forward pass, 0 for all")
    parser.add_argument("--peer-micro-batch", type=int, default=0, help="those of the others, 0 for all")
    parser.add_argument("--precision", choices=("float32", "bf16-master"), action="append", help=help_precision)
    parser.add_argument("--without", choices=("TRL", "plain"), action="append", default=[], help="leave one out")
    parser.add_argument("--rollouts", action="store_true", help="time sampling alone, in several shapes")
    parser.add_argument("--check", action="store_true", help="fail if a phase has lost its lead over `plain`")
    parser.add_argument("--model", default=str(BUILTIN), help="model folder")
    parser.add_argument("--out", type=Path, help="write every round as JSON")
    asked = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    shape = (asked.prompts, asked.completions, asked.tokens)
    if asked.peer_micro_batch and asked.prompts * asked.completions % asked.peer_micro_batch:
        parser.error("--peer-micro-batch must divide the completions of a step: TRL leaves out the rest")
    base = Work(
        asked.model, "float32", *shape, asked.ends, whole=not asked.rollouts, rounds=asked.rounds,
        micro_batch=asked.micro_batch, peer_micro_batch=asked.peer_micro_batch,
    )  # fmt: skip
    if asked.check:
        return check(replace(base, ends="none", rounds=3, of_processor=True))

    fastest = detect_precision("auto", torch.device("cpu"))
    precisions = asked.precision or sorted({"float32", fastest})
    shapes = SHAPES if asked.rollouts else (shape,)
    works = [
        replace(base, precision=precision, prompts=prompts, completions=completions, tokens=tokens)
        for prompts, completions, tokens in shapes
        for precision in precisions
    ]
    names = [name for name in CONTESTANTS if name not in asked.without and not (asked.rollouts and name == "TRL")]
    cells: list[list[str]] = []
    results = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=len(works) * (asked.rounds + 1))
        for work in works:
            rounds = measure(work, names, lambda: progress.advance(task))
            found = {name: summarize(each, len(work.rows)) for name, each in rounds.items()}
            cells += rows_of(work, found)
            every = {name: [asdict(one) for one in each] for name, each in rounds.items()}
            medians = {name: asdict(summary) for name, summary in found.items()}
            results.append({"work": asdict(work), "medians": medians, "rounds": every})
    phases = ["rollout", "total"] if asked.rollouts else PHASES
    endings = {"natural": "by themselves", "none": "when full"}
    print(f"seconds (times ours); completions end {endings[asked.ends]}\n")
    head = ["shape", "", *phases, "tokens/s of rollout", "mean length", "longest", "peak memory, GB"]
    print(table(head, cells))
    write(asked.out, results)


if __name__ == "__main__":
    main()
