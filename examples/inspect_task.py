"""The val puzzles in inspect-ai. Run: inspect eval examples/inspect_task.py --model hf/local -M model_path=MODEL"""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score


@scorer(metrics=[accuracy(), stderr()])
def solved() -> Scorer:
    async def judge(state: TaskState, target: Target) -> Score:
        result = score(state.output.completion, Puzzle(tuple(state.metadata["numbers"]), int(target.text)))
        return Score(value=CORRECT if result.correct else INCORRECT, answer=result.answer, explanation=result.reason)

    return judge


@task
def countdown() -> Task:
    puzzles = list(enumerate_puzzles(split="val"))
    samples = [Sample(input=prompt(p), target=str(p.target), metadata={"numbers": p.numbers}) for p in puzzles]
    return Task(dataset=samples, solver=generate(), scorer=solved(), config=GenerateConfig(max_tokens=360))
