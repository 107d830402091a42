"""The task as a taskset of verifiers, for its evaluations and for prime-rl.

Run, in this folder: vf-eval verifiers_task --env.agent.harness.id null (and the address of a model's server)
"""

from collections.abc import Iterator

import verifiers.v1 as vf

from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score

__all__ = ["CountdownTaskset"]


class CountdownData(vf.TaskData):
    numbers: tuple[int, ...]
    target: int


class CountdownTask(vf.Task[CountdownData]):
    @vf.reward
    async def reward(self, trace: vf.Trace) -> float:
        return score(trace.last_reply, Puzzle(self.data.numbers, self.data.target)).reward


class CountdownTaskset(vf.Taskset[CountdownTask, vf.TasksetConfig]):
    def load(self) -> Iterator[CountdownTask]:
        for puzzle in enumerate_puzzles(split="val"):
            system, question = prompt(puzzle, "zero-shot")
            asked = {"prompt": question["content"], "system_prompt": system["content"]}
            yield CountdownTask(CountdownData(**asked, numbers=puzzle.numbers, target=puzzle.target), self.config.task)
