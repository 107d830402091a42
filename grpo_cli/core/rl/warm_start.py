"""A short supervised warm start before reinforcement: imitate worked searches of train puzzles.

For a pretrained model that never answers correctly, so that no group of completions has anything to compare. What
reinforcement adds is measured against the warm-started model. Does not know where checkpoints are kept.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from grpo_cli.core.builtin.traces import reduce, tries, write
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle

BATCH = 8  # traces per step
LEARNING_RATE = 1e-4
WARMUP = 0.1  # share of the steps over which the learning rate rises; then it falls linearly to 0


def demonstration(puzzle: Puzzle, *, style: Style) -> str:
    """A completion that tries one form after another, in a fixed order and none twice, until one hits.

    Without spaces, `2*6+10=12+10=22 no`, it takes half the tokens of the built-in model's traces. Parentheses come
    early enough to be learned: no search gives up.
    """
    lines = []
    for tree in tries(puzzle.numbers):
        expression, steps = write(tree), [write(tree)]
        while not isinstance(tree, int):
            tree = reduce(tree)
            steps.append(write(tree))
        lines.append("=".join(steps).replace(" ", "") + (" yes" if tree == puzzle.target else " no"))
        if tree == puzzle.target:
            break
    else:
        raise ValueError(f"no form solves {puzzle}")
    thought = "\n".join(lines)
    if style == "natural":
        return f"{thought}\nThe expression is {expression}"
    return f"<think>\n{thought}\n</think>\n<answer>{expression}</answer>"


def demonstrations(puzzles: Sequence[Puzzle], count: int, *, style: Style, seed: int) -> list[tuple[Puzzle, str]]:
    """`count` puzzles with their demonstrations, short and long searches equally often."""
    rng, by_length = random.Random(seed), defaultdict(list)
    for puzzle in puzzles:
        text = demonstration(puzzle, style=style)
        by_length[text.count("\n")].append((puzzle, text))
    lengths = sorted(by_length)
    return [rng.choice(by_length[rng.choice(lengths)]) for _ in range(count)]


def warm_start(
    policy: Policy,
    examples: Sequence[tuple[Puzzle, str]],
    *,
    style: Style,
    learning_rate: float = LEARNING_RATE,
    poll: Callable[[], None] = lambda: None,
    report: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> None:
    """Train `policy` in place on the tokens of each demonstration once, with AdamW.

    `poll` is called before each step, and what it raises ends the warm start. `report` receives step, steps and loss.
    """
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, weight_decay=0.0)
    batches = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    for step, batch in enumerate(batches, start=1):
        poll()
        rise = max(1, round(WARMUP * len(batches)))
        scale = min(step / rise, (len(batches) + 1 - step) / max(1, len(batches) + 1 - rise))
        optimizer.param_groups[0]["lr"] = learning_rate * scale
        sequences = _sequences(policy, batch, style)
        logprobs, _ = policy.logprobs(sequences, temperature=1.0)  # (B, T)
        loss = -logprobs.sum() / sequences.mask().sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        report(step, len(batches), loss.item())


def _sequences(policy: Policy, batch: Sequence[tuple[Puzzle, str]], style: Style) -> Sequences:
    """Prompts with the demonstrations as completions, each ended by the first end-of-sequence token of the turn."""
    end = policy.tokenizer.eos_token_id
    completions = [[*policy.tokenizer(text, add_special_tokens=False)["input_ids"], end] for _, text in batch]
    return Sequences(
        [policy.encode(prompt(puzzle, style)) for puzzle, _ in batch], completions, list(range(len(batch)))
    )
