"""Train with TRL: `score` as the reward of its GRPOTrainer. Run: python examples/trl_grpo.py MODEL STEPS OUTPUT"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score


def reward(completions: list, numbers: list, target: list, **_: object) -> list[float]:
    asked = zip(completions, numbers, target, strict=True)
    return [score(turns[0]["content"], Puzzle(tuple(own), goal)).reward for turns, own, goal in asked]


model, steps, output = sys.argv[1:]
puzzles = list(enumerate_puzzles(split="train"))
rows = [{"prompt": prompt(one), "numbers": list(one.numbers), "target": one.target} for one in puzzles]
settings = GRPOConfig(
    output_dir=output,
    max_steps=int(steps),
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=160,
    learning_rate=1e-4,
    logging_steps=1,
    report_to="none",
    bf16=False,
)
trainer = GRPOTrainer(model=model, reward_funcs=reward, args=settings, train_dataset=Dataset.from_list(rows))
trainer.train()
