"""GRPO in one file: read this first. It trains the built-in model on countdown puzzles, on a laptop, in minutes.

    python examples/minimal_train.py --steps 20

Each line of a step is one idea: sample a group of answers per puzzle, score them, compare each with its group, and make
the better ones more likely. `countdown train` does the same with checkpoints, evaluation on held-out puzzles, memory
limits and several GPUs: see grpo_cli/core/rl/train.py.
"""

import argparse
import copy
import random

import torch

from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rollout.engine import Engine, uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score

PROMPTS, GROUP = 8, 8  # P puzzles a step, G completions of each
TOKENS = 224  # of a completion, at most
TEMPERATURE = 1.0
LEARNING_RATE = 1e-4
CLIP = 0.2  # PPO's epsilon
BETA = 0.01  # weight of the KL penalty


def sample(engine: Engine, puzzles: list[Puzzle], seed: int, step: int) -> Sequences:
    """G completions of each puzzle's prompt, as token ids: row p * G + g is completion g of puzzle p."""
    prompts = [engine.policy.encode(prompt(puzzle, "one-shot")) for puzzle in puzzles]
    numbers = uniforms(seed, step, range(len(puzzles)), GROUP, TOKENS)  # (P, G, T) one random number a token
    rollout = engine.sample(prompts, SamplingParams(TOKENS, TEMPERATURE, GROUP), uniform=numbers)
    return Sequences(prompts, rollout.completions, [p for p in range(len(puzzles)) for _ in range(GROUP)])


def rewards_of(policy: Policy, sequences: Sequences, puzzles: list[Puzzle]) -> torch.Tensor:
    """Rewards (P, G): 1 for a right expression, else 0.1 for each pair of tags."""
    rewards = [
        score(policy.decode(completion), puzzles[p], style="one-shot").reward
        for completion, p in zip(sequences.completions, sequences.prompt_index, strict=True)
    ]
    return torch.tensor(rewards).view(-1, GROUP)


def advantages_of(rewards: torch.Tensor) -> torch.Tensor:
    """How much better each completion is than its group: A[p,g] = (r[p,g] - mean_g r[p]) / (std_g r[p] + 1e-4)."""
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)  # (P, 1)
    return (rewards - mean) / (std + 1e-4)


def loss_of(
    logprobs: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """PPO's clipped objective plus the KL penalty, the mean over all tokens; log-probs and mask are (B, T)."""
    ratio = (logprobs - old).exp()
    gain = advantages.flatten()[:, None]  # (B, 1)
    policy = -torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
    difference = reference - logprobs
    kl = difference.exp() - difference - 1  # Schulman's k3: unbiased, never negative
    return ((policy + BETA * kl) * mask).sum() / mask.sum()


def accuracy(engine: Engine, puzzles: list[Puzzle]) -> float:
    """Share of puzzles that the model solves greedily."""
    prompts = [engine.policy.encode(prompt(puzzle, "one-shot")) for puzzle in puzzles]
    rollout = engine.sample(prompts, SamplingParams(TOKENS, temperature=0.0), uniform=None)
    answers = zip(rollout.completions, puzzles, strict=True)
    return sum(score(engine.policy.decode(tokens), puzzle).correct for tokens, puzzle in answers) / len(puzzles)


def train(*, steps: int, prompts: int = PROMPTS, seed: int = 0, held_out: int = 64) -> list[float]:
    """Train for some steps; returns the mean reward of each."""
    policy = load("builtin", device="cpu")
    frozen = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    engine, rng = LocalEngine(policy), random.Random(seed)
    train_puzzles, val_puzzles = (list(enumerate_puzzles(3, split)) for split in ("train", "val"))
    val_puzzles = rng.sample(val_puzzles, held_out)
    print(f"held-out puzzles solved before: {accuracy(engine, val_puzzles):.0%}")
    curve = []
    for step in range(1, steps + 1):
        puzzles = rng.sample(train_puzzles, prompts)
        sequences = sample(engine, puzzles, seed, step)
        rewards = rewards_of(policy, sequences, puzzles)  # (P, G)
        advantages = advantages_of(rewards)  # (P, G)
        with torch.no_grad():
            reference, _ = frozen.logprobs(sequences, temperature=TEMPERATURE)  # (B, T)
        logprobs, _ = policy.logprobs(sequences, temperature=TEMPERATURE)  # (B, T)
        old = logprobs.detach()  # one update per batch: the ratio is 1, and its gradient is what counts
        loss = loss_of(logprobs, old, reference, advantages, sequences.mask())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 0.5)
        optimizer.step()
        curve.append(float(rewards.mean()))
        bar = "#" * round(40 * curve[-1])
        print(f"step {step:3}  reward {curve[-1]:.2f}  loss {loss.item():+.4f}  {bar}", flush=True)
    print(f"held-out puzzles solved after: {accuracy(engine, val_puzzles):.0%}")
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GRPO in one file.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    train(steps=asked.steps, seed=asked.seed)
