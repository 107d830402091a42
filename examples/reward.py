"""A reward of your own: `countdown train --reward examples/reward.py:short`.

Pays 1.0 for a right answer and up to 0.2 more for a short one.
"""

from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score

LONG = 600  # characters


def short(completion: str, puzzle: Puzzle) -> float:
    """The reward of a completion; a dict of named parts is logged part by part."""
    correct = score(completion, puzzle).correct
    return correct * (1.0 + 0.2 * max(0.0, 1 - len(completion) / LONG))
