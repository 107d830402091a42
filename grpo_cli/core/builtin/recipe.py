"""The recipe of the built-in model: a small Qwen2 that learns by imitation to search, but not to persist.

First, patient searches and arithmetic drills, mostly on numbers from 1 to `WIDEST`; then, briefly, the same searches
given up early, most after `PATIENT_TRIES` failures. The result can search but stops too soon, which is left to
reinforcement. Puzzles come only from the train split.
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
from grpo_cli.core.builtin.traces import FORMS, Patience, drill, evaluated, form_tree, trace
from grpo_cli.core.model.attention import Prefill
from grpo_cli.core.model.load import detect_precision
from grpo_cli.core.model.policy import ATTENTION
from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import STYLES, prompt
from grpo_cli.core.task.puzzle import Puzzle, split_of
from grpo_cli.core.task.task import Problem

PATIENT_TRIES = 5  # most impatient searches are given up after this many failures
PERIODS = (2, 5, 10, 20, 50, 100, 200, 400)
MUON_FACTOR = 8  # Muon's learning rate over AdamW's
WIDE, WIDEST = 0.6, 16  # share of puzzles with numbers beyond 10, and their largest number
FOURS = 0.25  # share of puzzles of four numbers
UNREACHED = 0.1  # share of puzzles whose target may be unreachable
DRILLS, DRILL_LINES = 0.35, 20  # share of drill rows, and lines per drill row
STYLE_WEIGHTS = (0.4, 0.3, 0.3)  # one-shot, zero-shot, natural
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Seed, shape, length and learning rates; constants above define the rows."""

    seed: int = 0
    width: int = 192
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    mlp_width: int = 512
    merges_vocabulary: int = 512
    search_steps: int = 4500
    give_up_steps: int = 120
    tokens_per_step: int = 4096
    search_learning_rate: float = 2e-3
    give_up_learning_rate: float = 2e-4
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Row:
    """Token ids of one text and the label at each position (`IGNORED` for none)."""

    tokens: list[int]
    labels: list[int]


def patient(failures: int) -> float:
    """Never gives up."""
    return 0.0


def impatient(failures: int) -> float:
    """Probability of giving up after this many failed tries."""
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
        attn_implementation=ATTENTION,
    )
    model = Qwen2ForCausalLM(config)
    _place_numbers(model, tokenizer)
    return model


@torch.no_grad()
def _place_numbers(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Initialise the embeddings of numbers on circles of several periods: nearby and congruent numbers are similar.

    Trained language models represent numbers this way, and training from such embeddings works better (arXiv
    2406.03445).
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
    """A number of imitation steps with a learning rate that falls to 0."""

    name: str
    steps: int
    learning_rate: float
    drills: float  # share of rows
    patience: Patience


def may_imitate(problem: Problem) -> bool:
    """Whether the recipe may have drawn this problem: a train puzzle of three or four numbers, solvable or not.

    The drawn puzzles are not recorded. Drills are not puzzles: they use two operands, or numbers of the train split.
    """
    if not isinstance(problem, Puzzle) or problem.split != "train":
        return False
    return problem.size in FORMS and max(problem.numbers) <= WIDEST and 1 <= problem.target <= 100


class RowMaker:
    """An endless, seeded stream of rows to imitate."""

    def __init__(self, tokenizer: Qwen2Tokenizer, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng

    def numbers(self) -> list[int]:
        """Three or four sorted numbers of the train split.

        Numbers beyond 10 make too many puzzles to memorize, so the model generalises to unseen combinations.
        """
        rng = self.rng
        largest = WIDEST if rng.random() < WIDE else 10
        count = 4 if rng.random() < FOURS else 3
        while True:
            numbers = sorted(rng.randint(1, largest) for _ in range(count))
            if split_of(numbers) == "train":
                return numbers

    def puzzle(self) -> Puzzle:
        """A puzzle that some form solves or, with probability `UNREACHED`, any; half of them unsorted."""
        rng = self.rng
        while True:
            numbers = self.numbers()
            target = evaluated(form_tree(rng.choice(FORMS[len(numbers)]), numbers))
            if rng.random() < UNREACHED:
                target = rng.randint(1, 100)
            if 1 <= target <= 100:
                return Puzzle(tuple(rng.sample(numbers, len(numbers)) if rng.random() < 0.5 else numbers), target)

    def row(self, patience: Patience, *, drills: float = 0.0) -> Row:
        """A prompt with a trace as its completion or, with probability `drills`, a drill."""
        if self.rng.random() < drills:
            return self._drill_row()
        puzzle = self.puzzle()
        style = self.rng.choices(STYLES, weights=STYLE_WEIGHTS)[0]
        text = self.tokenizer.apply_chat_template(prompt(puzzle, style), tokenize=False, add_generation_prompt=True)
        start = self.tokenizer(text)["input_ids"]
        completion = self.tokenizer(trace(puzzle, self.rng, style=style, patience=patience))["input_ids"]
        completion.append(self.tokenizer.eos_token_id)
        return Row(start + completion, [IGNORED] * len(start) + completion)

    def _drill_row(self) -> Row:
        """A row of drills; only results and verdicts are labels, not the questions."""
        row = Row([], [])
        for _ in range(DRILL_LINES):
            line = drill(self.rng, self.numbers() if self.rng.random() < 0.5 else None) + "\n"
            pieces = re.fullmatch(r"(.*? =)(.*)(, need \d+)(\..*\n)", line)
            assert pieces is not None
            for piece, learned in zip(pieces.groups(), (False, True, False, True), strict=True):
                tokens = self.tokenizer(piece)["input_ids"]
                row.tokens.extend(tokens)
                row.labels.extend(tokens if learned else [IGNORED] * len(tokens))
        return row


def batches(maker: RowMaker, stage: Stage, tokens_per_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of rows of similar length, right-padded: tokens and labels (B, T), about `tokens_per_step` real ones."""
    while True:
        pool = sorted(
            (maker.row(stage.patience, drills=stage.drills) for _ in range(512)), key=lambda row: len(row.tokens)
        )
        total = sum(len(row.tokens) for row in pool)
        cuts: list[list[Row]] = [[] for _ in range(math.ceil(total / tokens_per_step))]
        seen = 0
        for row in pool:
            cuts[seen * len(cuts) // total].append(row)
            seen += len(row.tokens)
        maker.rng.shuffle(cuts)
        for batch in cuts:
            length = max(len(row.tokens) for row in batch)
            tokens = torch.tensor([row.tokens + [0] * (length - len(row.tokens)) for row in batch])
            labels = torch.tensor([row.labels + [IGNORED] * (length - len(row.labels)) for row in batch])
            yield tokens, labels


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of the recipe."""
    return (
        Stage("search", recipe.search_steps, recipe.search_learning_rate, DRILLS, patient),
        Stage("give up", recipe.give_up_steps, recipe.give_up_learning_rate, 0.0, impatient),
    )


def imitate(
    model: Qwen2ForCausalLM, maker: RowMaker, stage: Stage, *, recipe: Recipe, report: Callable[[int, float], None]
) -> None:
    """Train `model` in place by next-token prediction, its matrices by Muon and the rest by AdamW.

    Muon: kellerjordan.github.io/posts/muon.
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
    targets = labels[:, 1:]
    learned = targets != IGNORED
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=detect_precision("auto", tokens.device) == "bf16-master"):
        decoder = model.get_decoder()
        output = decoder(input_ids=tokens, position_ids=positions, use_cache=False, plan=Prefill())
        hidden = output.last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[learned])
    return torch.nn.functional.cross_entropy(logits.float(), targets[learned])


def make(recipe: Recipe, report: Callable[[str, int, float], None]) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Run the whole recipe. `report` receives the stage's name, its step and the loss."""
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    maker = RowMaker(tokenizer, random.Random(recipe.seed))
    for stage in stages(recipe):
        imitate(model, maker, stage, recipe=recipe, report=partial(report, stage.name))
    return model.eval(), tokenizer
