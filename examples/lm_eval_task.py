"""The val puzzles in lm-evaluation-harness. Run: python examples/lm_eval_task.py MODEL [LIMIT]"""

import sys

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask

from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import SYSTEM, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score


def puzzles(**_: object) -> dict[str, Dataset]:
    asked = [(one, prompt(one, "zero-shot")[-1]["content"]) for one in enumerate_puzzles(split="val")]
    return {"val": Dataset.from_list([{"numbers": p.numbers, "target": p.target, "question": q} for p, q in asked])}


def results(row: dict, completions: list[str]) -> dict[str, bool]:
    return {"accuracy": score(completions[0], Puzzle(tuple(row["numbers"]), row["target"])).correct}


task = ConfigurableTask(
    config={
        "task": "countdown",
        "custom_dataset": puzzles,
        "test_split": "val",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{target}}",
        "process_results": results,
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["</answer><"], "max_gen_toks": 360, "do_sample": False},
    }
)
name, limit = sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else None
chat = {"apply_chat_template": True, "system_instruction": SYSTEM, "device": "cpu", "batch_size": 32}
done = simple_evaluate(model="hf", model_args=f"pretrained={name}", tasks=[task], limit=limit, **chat)
print(done["results"]["countdown"])
