"""The model card of a run, in Markdown: base model, settings, data, results, usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_cli import __version__
from grpo_cli.core.run.logs import Evaluated
from grpo_cli.ui.text import interval, percent, printable

HYPERPARAMETERS = (
    "train.num_iterations",
    "train.batch_size",
    "train.num_generations",
    "train.max_new_tokens",
    "train.temperature",
    "train.learning_rate",
    "train.num_inner_updates",
    "train.clip_grad_norm",
    "loss.loss_type",
    "loss.beta",
    "loss.epsilon",
    "loss.epsilon_high",
    "loss.scale_rewards",
    "model.precision",
    "train.optimizer",
    "train.seed",
)

QUESTION = "Using the numbers [4, 7, 3], create an expression that equals 25."
USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
question = "{question}"
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={tokens})[0]))
```

Its own prompts are those of `countdown solve --model path/to/this/folder "4 7 3 = 25"`."""


@dataclass(frozen=True)
class CardFacts:
    """The contents of a card; `license` is the base model's, or None if unknown."""

    name: str
    base_model: str
    license: str | None
    settings: Mapping[str, object]
    evaluations: Mapping[str, Mapping[int, Evaluated]]
    best_step: int
    contamination: str
    is_adapter: bool = False


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with the YAML header of model hubs. All text of a run is escaped."""
    settings = facts.settings
    about, data = _task(settings)
    tokens = settings["train.max_new_tokens"]
    rows = [(f"`{key}`", f"`{_text(str(settings[key]))}`") for key in HYPERPARAMETERS]
    imitated = settings["train.warm_start"]
    before = f"imitating {imitated:,} worked searches, then by " if imitated else ""
    sections = [
        _header(facts),
        f"# {_text(facts.name)}",
        f"{about} Trained from `{_text(facts.base_model)}` by {before}GRPO (group relative policy optimization) with"
        f" `countdown` {__version__}.",
        f"## Results\n\n{_results(facts)}",
        f"## Training data\n\n{data} {_sentence(facts.contamination)}",
        f"## Settings\n\n{_table(('setting', 'value'), rows)}",
        f"## Usage\n\n{_usage(facts, tokens)}",
        f"## Limits\n\nTrained on one task: it is not a general assistant. License of the base model:"
        f" {_text(facts.license) if facts.license else 'see the base model'}.",
    ]
    return "\n\n".join(sections) + "\n"


def _task(settings: Mapping[str, object]) -> tuple[str, str]:
    """What the model does, and the data that it was trained on."""
    name, numbers = (_text(str(settings[f"task.{key}"])) for key in ("task", "numbers"))
    if name != "countdown":
        return f"A language model trained on the task `{name}`.", f"Train problems of `{name}`."
    files = any(settings[f"task.{key}"] != "none" for key in ("puzzles", "dev_puzzles", "val_puzzles"))
    origin = "from files" if files else "of which at least one is odd"
    even = "" if files else "; evaluation puzzles have even numbers only"
    return (
        f"A language model that solves countdown puzzles: given {numbers} numbers and a target, it writes an"
        " expression that uses every number exactly once.",
        f"Train puzzles of {_scheduled(settings, 'numbers')} numbers {origin}, prompts in"
        f" {_scheduled(settings, 'style')} style{even}.",
    )


def _scheduled(settings: Mapping[str, object], name: str) -> str:
    """The style or size of the prompts, or its schedule."""
    schedule = settings[f"train.prompt_{name}"]
    return _text(str(settings[f"task.{name}"])) if schedule == "task" else f"`{_text(str(schedule))}`"


def _usage(facts: CardFacts, tokens: object) -> str:
    usage = USAGE.format(tokens=tokens, question=QUESTION)
    if facts.settings["task.task"] != "countdown":
        usage = usage.replace(QUESTION, "...").partition("\n\nIts own prompts")[0]
    if not facts.is_adapter:
        return usage
    load = 'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")'
    base = f'base = AutoModelForCausalLM.from_pretrained("{_text(facts.base_model)}")'
    usage = usage.replace(load, f'{base}\nmodel = PeftModel.from_pretrained(base, "path/to/this/folder")')
    usage = usage.replace("```python\n", "```python\nfrom peft import PeftModel\n")
    return usage.partition("\n\nIts own prompts")[0]


def _header(facts: CardFacts) -> str:
    library = "peft" if facts.is_adapter else "transformers"
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [countdown, grpo, rlvr]"]
    if facts.license:
        lines.append(f"license: {_text(facts.license)}")
    if "/" in facts.base_model:  # a hub id
        lines.append(f"base_model: {_text(facts.base_model)}")
    return "\n".join(["---", *lines, "---"])


def _results(facts: CardFacts) -> str:
    rows = []
    for cell, steps in facts.evaluations.items():
        start = "after the warm start" if facts.settings["train.warm_start"] else "base"
        for word, step in ((start, 0), ("trained", facts.best_step)):
            if step in steps:
                rows.append((_text(cell), word, str(step), *_measured(steps[step])))
    if not rows:
        return "Not evaluated."
    on = (
        "dev puzzles, which are not the val puzzles"
        if any(cell.startswith("dev") for cell in facts.evaluations)
        else ""
    )
    note = f"Greedy decoding, 95 % Wilson intervals. The trained model is the best on {on or 'these puzzles'}."
    return f"{_table(('puzzles', 'model', 'step', 'accuracy', '95 % interval', 'count'), rows)}\n\n{note}"


def _measured(evaluated: Evaluated) -> tuple[str, str, str]:
    bounds = evaluated.interval
    return percent(evaluated.accuracy), interval(bounds) if bounds else "-", f"{evaluated.count:,}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("`", "'")


def _sentence(text: str) -> str:
    shown = _text(text)
    return f"{shown[:1].upper()}{shown[1:]}."
