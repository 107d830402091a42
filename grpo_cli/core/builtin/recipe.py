"""The recipe that made the built-in model: a small Qwen2 that learns by imitation to search, but not to persist.

First two-operand arithmetic and comparison alone, then whole searches on patient traces, then, shortly, the same
searches given up early, most after `PATIENT_TRIES` failures. What is left is a model that can search, and stops too
soon; the rest is for reinforcement. Puzzles come from the train split alone. Knows neither terminals nor
reinforcement.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo_cli.core.builtin.tokenizer import LARGEST_NUMBER, train_tokenizer
from grpo_cli.core.builtin.traces import THREE, Patience, drill, evaluated, form_tree, trace
from grpo_cli.core.puzzle import Puzzle, enumerate_puzzles, split_of
from grpo_cli.core.task import STYLES, prompt

PATIENT_TRIES = 6  # most impatient searches are given up after this many failures
PERIODS = (2, 5, 10, 20, 50, 100, 200, 400)
MUON_FACTOR = 8  # Muon's learning rate over AdamW's
WIDEST = 20  # largest number of a wide puzzle
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
    search_steps: int = 1000
    generalize_steps: int = 300
    give_up_steps: int = 120
    tokens_per_step: int = 4096
    learning_rate: float = 2e-3
    generalize_learning_rate: float = 1e-3
    give_up_learning_rate: float = 2e-4
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
    model = Qwen2ForCausalLM(config)
    _place_numbers(model, tokenizer)
    return model


@torch.no_grad()
def _place_numbers(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Start the embeddings of numbers on circles of several periods, so that nearby and congruent numbers look alike.

    Trained language models add numbers so, and those that start from such embeddings learn better (arXiv 2406.03445).
    """
    embedding = model.get_input_embeddings().weight
    spread = model.config.initializer_range
    numbers = torch.arange(LARGEST_NUMBER + 1)
    angles = 2 * math.pi * numbers[:, None] / torch.tensor(PERIODS)
    circles = torch.cat([angles.cos(), angles.sin()], dim=1)  # (201, 2 * periods)
    directions = torch.randn(circles.shape[1], embedding.shape[1]) / math.sqrt(len(PERIODS))
    placed = spread * circles @ directions
    for space in ("", " "):
        ids = tokenizer.convert_tokens_to_ids([f"{space}{number}" for number in numbers.tolist()])
        embedding[ids] += 0.5 * placed


@dataclass(frozen=True)
class Stage:
    """Some steps of imitation on one kind of data, from a learning rate that falls to 0."""

    name: str
    steps: int
    learning_rate: float
    drills: float  # share of rows that are drills
    wide: float  # share of puzzles whose numbers go beyond 10
    patience: Patience


class RowMaker:
    """An endless, seeded stream of rows to imitate."""

    def __init__(self, tokenizer: Qwen2Tokenizer, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.solvable = list(enumerate_puzzles(numbers=3, split="train"))

    def puzzle(self, wide: float = 0.0) -> Puzzle:
        """Mostly solvable puzzles of three numbers; some with any target, some of four numbers; never a val puzzle."""
        rng = self.rng
        if wide and rng.random() < wide:
            return self._wide_puzzle()
        puzzle = rng.choice(self.solvable)
        if rng.random() < 0.25:
            puzzle = self._any_puzzle(4 if rng.random() < 0.2 else 3)
        if rng.random() < 0.5:
            return Puzzle(tuple(rng.sample(puzzle.numbers, len(puzzle.numbers))), puzzle.target)
        return puzzle

    def _any_puzzle(self, count: int) -> Puzzle:
        """Sorted numbers of the train split with any target, solvable or not."""
        while True:
            numbers = tuple(sorted(self.rng.randint(1, 10) for _ in range(count)))
            if split_of(numbers) == "train":
                return Puzzle(numbers, self.rng.randint(1, 100))

    def _wide_puzzle(self) -> Puzzle:
        """Three numbers up to `WIDEST`, one of them odd, and a target that one of the forms reaches.

        There are too many to memorize, so that what is learned here holds for numbers never seen together.
        """
        while True:
            numbers = tuple(sorted(self.rng.randint(1, WIDEST) for _ in range(3)))
            target = evaluated(form_tree(self.rng.choice(THREE), (numbers[0], numbers[1], numbers[2])))
            if split_of(numbers) == "train" and 1 <= target <= 100:
                return Puzzle(numbers, target)

    def row(self, patience: Patience, *, drills: float = 0.0, wide: float = 0.0) -> Row:
        """A prompt with a trace as its completion or, with probability `drills`, a drill."""
        if self.rng.random() < drills:
            return self._drill_row()
        puzzle = self.puzzle(wide)
        style = self.rng.choices(STYLES, weights=(0.25, 0.5, 0.25))[0]
        text = self.tokenizer.apply_chat_template(prompt(puzzle, style), tokenize=False, add_generation_prompt=True)
        start = self.tokenizer(text)["input_ids"]
        completion = self.tokenizer(trace(puzzle, self.rng, style=style, patience=patience))["input_ids"]
        completion.append(self.tokenizer.eos_token_id)
        return Row(start + completion, [IGNORED] * len(start) + completion)

    def _drill_row(self) -> Row:
        """A drill of which only values and verdicts are learned, not what they are asked about."""
        row = Row([], [])
        for line in drill(self.rng, lines=24).splitlines():
            question, value, need, verdict = re.split(r"(?<= =)|(?=, need)|(?=\. )", line + "\n")
            for piece, learned in ((question, False), (value, True), (need, False), (verdict, True)):
                tokens = self.tokenizer(piece)["input_ids"]
                row.tokens.extend(tokens)
                row.labels.extend(tokens if learned else [IGNORED] * len(tokens))
        return row


def batches(maker: RowMaker, stage: Stage, tokens_per_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of rows of like length, right-padded: tokens (B, T) and labels (B, T), B * T about `tokens_per_step`."""
    while True:
        rows = (maker.row(stage.patience, drills=stage.drills, wide=stage.wide) for _ in range(512))
        pool = sorted(rows, key=lambda row: len(row.tokens))
        cuts: list[list[Row]] = [[]]
        for row in pool:
            if (len(cuts[-1]) + 1) * len(row.tokens) > tokens_per_step:
                cuts.append([])
            cuts[-1].append(row)
        maker.rng.shuffle(cuts)
        for batch in cuts:
            length = max(len(row.tokens) for row in batch)
            tokens = torch.tensor([row.tokens + [0] * (length - len(row.tokens)) for row in batch])
            labels = torch.tensor([row.labels + [IGNORED] * (length - len(row.labels)) for row in batch])
            yield tokens, labels


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """What the model goes through."""
    return (
        Stage("search", recipe.search_steps, recipe.learning_rate, 0.25, 0.0, patient),
        Stage("generalize", recipe.generalize_steps, recipe.generalize_learning_rate, 0.5, 0.7, patient),
        Stage("give up", recipe.give_up_steps, recipe.give_up_learning_rate, 0.0, 0.6, impatient),
    )


def imitate(
    model: Qwen2ForCausalLM, maker: RowMaker, stage: Stage, *, recipe: Recipe, report: Callable[[int, float], None]
) -> None:
    """Train `model` in place by next-token prediction, its matrices by Muon and the rest by AdamW.

    Muon (kellerjordan.github.io/posts/muon) gets here in 140 steps as far as AdamW alone in 240.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    others = [model.get_input_embeddings().weight, *(weight for weight in model.parameters() if weight.dim() == 1)]
    muon = torch.optim.Muon(matrices, weight_decay=recipe.weight_decay)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    stream = batches(maker, stage, recipe.tokens_per_step)
    model.train()
    for done in range(stage.steps):
        scale = min(1.0, (done + 1) / 40) * 0.5 * (1 + math.cos(math.pi * done / stage.steps))
        loss = _next_token_loss(model, *next(stream))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in ((muon, MUON_FACTOR * stage.learning_rate), (adamw, stage.learning_rate)):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()  # type: ignore[no-untyped-call]
        report(done + 1, loss.item())


def _next_token_loss(model: Qwen2ForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labels that are not ignored."""
    wanted = labels[:, 1:]
    learned = wanted != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[learned])
    return torch.nn.functional.cross_entropy(logits.float(), wanted[learned])


def make(recipe: Recipe, report: Callable[[str, int, float], None]) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Run the whole recipe. `report` receives the stage's name, its step and the loss."""
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    maker = RowMaker(tokenizer, random.Random(recipe.seed))
    for stage in stages(recipe):
        imitate(model, maker, stage, recipe=recipe, report=partial(report, stage.name))
    return model.eval(), tokenizer
