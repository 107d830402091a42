"""The reward of the task for verl, on files of `countdown gen-data --columns verl`.

verl's option: reward.custom_reward_function.path=examples/verl_reward.py
"""

from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score


def compute_score(data_source: str, solution_str: str, ground_truth: dict, extra_info: dict | None = None) -> dict:
    result = score(solution_str, Puzzle(tuple(ground_truth["numbers"]), ground_truth["target"]))
    return {"score": result.reward, "acc": result.correct}
