"""The recipe that made the built-in model: a small Qwen2 that learns by imitation to search, but not to persist.

Stage 1 teaches the whole search on patient traces, mixed with two-operand drills. Stage 2 is short: the same searches
given up early, most after `PATIENT_TRIES` failures. What is left is a model that can search, and stops too soon; the
rest is for reinforcement. Puzzles come from the train split alone. Knows neither terminals nor the training by
reinforcement.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo_cli.core.builtin.tokenizer import train_tokenizer
from grpo_cli.core.builtin.traces import Patience, drill, trace
from grpo_cli.core.puzzle import Puzzle, enumerate_puzzles, split_of
from grpo_cli.core.task import STYLES, prompt

PATIENT_TRIES = 6  # in stage 2 most searches are given up after this many failures
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Every number that the built-in model's weights depend on."""

    seed: int = 0
    width: int = 192
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    mlp_width: int = 512
    merges_vocabulary: int = 512
    patient_steps: int = 2000
    impatient_steps: int = 120
    tokens_per_step: int = 4096
    learning_rate: float = 2e-3
    impatient_learning_rate: float = 2e-4
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Row:
    """Token ids of one text and the id to be learned at each position (`IGNORED` where there is none)."""

    tokens: list[int]
    labels: list[int]


def patient(failures: int) -> float:
    """Never gives up before the space is exhausted."""
    return 0.0


def impatient(failures: int) -> float:
    """Probability of giving up after so many failed tries."""
    return 0.1 if failures < PATIENT_TRIES else 0.75


def build_tokenizer(recipe: Recipe) -> Qwen2Tokenizer:
    """The tokenizer, trained on prompts and traces of train puzzles."""
    rng = random.Random(recipe.seed)
    texts = []
    for puzzle in list(enumerate_puzzles(numbers=3, split="train"))[::4]:
        for style in STYLES:
            texts += [f"{message['role']}\n{message['content']}" for message in prompt(puzzle, style)]
            texts.append(trace(puzzle, rng, style=style, patience=patient))
    return train_tokenizer(texts, vocabulary=recipe.merges_vocabulary)


def build_model(recipe: Recipe, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """The untrained model, its embedding rounded up to a multiple of 64 rows."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


class RowMaker:
    """An endless, seeded stream of rows to imitate."""

    def __init__(self, tokenizer: Qwen2Tokenizer, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.solvable = list(enumerate_puzzles(numbers=3, split="train"))

    def puzzle(self) -> Puzzle:
        """Mostly solvable puzzles of three numbers; some with any target, some of four numbers; never a val puzzle."""
        rng = self.rng
        puzzle = rng.choice(self.solvable)
        if rng.random() < 0.3:
            puzzle = self._any_puzzle(4 if rng.random() < 0.25 else 3)
        if rng.random() < 0.5:
            return Puzzle(tuple(rng.sample(puzzle.numbers, len(puzzle.numbers))), puzzle.target)
        return puzzle

    def _any_puzzle(self, count: int) -> Puzzle:
        """Sorted numbers of the train split with any target, solvable or not."""
        while True:
            numbers = tuple(sorted(self.rng.randint(1, 10) for _ in range(count)))
            if split_of(numbers) == "train":
                return Puzzle(numbers, self.rng.randint(1, 100))

    def row(self, patience: Patience) -> Row:
        """A prompt with a trace as its completion, or now and then a drill."""
        if self.rng.random() < 0.2:
            return self._drill_row()
        puzzle = self.puzzle()
        style = self.rng.choices(STYLES, weights=(0.4, 0.35, 0.25))[0]
        text = self.tokenizer.apply_chat_template(prompt(puzzle, style), tokenize=False, add_generation_prompt=True)
        start = self.tokenizer(text)["input_ids"]
        completion = self.tokenizer(trace(puzzle, self.rng, style=style, patience=patience))["input_ids"]
        completion.append(self.tokenizer.eos_token_id)
        return Row(start + completion, [IGNORED] * len(start) + completion)

    def _drill_row(self) -> Row:
        row = Row([], [])
        for line in drill(self.rng, lines=12).splitlines():
            question, rest = line.split(" =")
            value, need = rest.split(", need ")
            target, verdict = need.split(". ")
            pieces = [
                (f"{question} =", False),
                (f"{value}, need", True),
                (f" {target}", False),
                (f". {verdict}\n", True),
            ]
            for piece, learned in pieces:
                tokens = self.tokenizer(piece)["input_ids"]
                row.tokens.extend(tokens)
                row.labels.extend(tokens if learned else [IGNORED] * len(tokens))
        return row


def batches(maker: RowMaker, patience: Patience, tokens_per_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of rows of like length, right-padded: tokens (B, T) and labels (B, T), B * T about `tokens_per_step`."""
    while True:
        pool = sorted((maker.row(patience) for _ in range(768)), key=lambda row: len(row.tokens))
        cuts: list[list[Row]] = [[]]
        for row in pool:
            if (len(cuts[-1]) + 1) * len(row.tokens) > tokens_per_step:
                cuts.append([])
            cuts[-1].append(row)
        maker.rng.shuffle(cuts)
        for rows in cuts:
            length = max(len(row.tokens) for row in rows)
            tokens = torch.tensor([row.tokens + [0] * (length - len(row.tokens)) for row in rows])
            labels = torch.tensor([row.labels + [IGNORED] * (length - len(row.labels)) for row in rows])
            yield tokens, labels


def imitate(
    model: Qwen2ForCausalLM,
    maker: RowMaker,
    *,
    recipe: Recipe,
    steps: int,
    learning_rate: float,
    patience: Patience,
    report: Callable[[int, float], None],
) -> None:
    """Train `model` in place by next-token prediction, the learning rate falling to zero by a cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    stream = batches(maker, patience, recipe.tokens_per_step)
    model.train()
    for step in range(steps):
        scale = min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * scale
        tokens, labels = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
            wanted = labels[:, 1:]
            logits = model.lm_head(hidden[wanted != IGNORED])
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted[wanted != IGNORED])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, loss.item())


def make(recipe: Recipe, report: Callable[[str, int, float], None]) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Run the whole recipe. `report` receives the stage, its step and the loss."""
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    maker = RowMaker(tokenizer, random.Random(recipe.seed))
    stages = (
        ("search", recipe.patient_steps, recipe.learning_rate, patient),
        ("give up", recipe.impatient_steps, recipe.impatient_learning_rate, impatient),
    )
    for stage, steps, learning_rate, patience in stages:
        imitate(
            model,
            maker,
            recipe=recipe,
            steps=steps,
            learning_rate=learning_rate,
            patience=patience,
            report=partial(report, stage),
        )
    return model.eval(), tokenizer
