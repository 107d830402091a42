"""What each setting is called and what it may be; `config.toml` holds its default.

A setting's flag, TOML key and environment variable share its name here. Where values come from is not known here.
"""

import hashlib
import json
from functools import partial, reduce
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from grpo_cli.core.task.curriculum import schedule
from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.rules import Rules, operations_in
from grpo_cli.core.task.scoring import Rewards
from grpo_cli.core.task.suite import SIZES, cell

_KINDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "`true` or `false`",
    str: "text that is not empty",
}
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


class Table(BaseModel):
    """One table of `config.toml`; `true` is no number, 1.0 is no whole number, and nothing is infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _in_one_line(value: object) -> object:
    """A table of weights, or a single number, as the text of a schedule."""
    if isinstance(value, dict):
        return ", ".join(f"{name} = {weight}" for name, weight in value.items())
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _scheduled(text: str, *, choices: tuple[str, ...]) -> str:
    if text != "task":
        schedule(text, choices)
    return text


def _some_weight(cells: dict[str, float]) -> dict[str, float]:
    if not any(cells.values()):
        raise ValueError("no cell has a weight above 0")
    return cells


def _switched(value: object) -> object:
    """What was once a switch, in files of that time."""
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)


StyleSchedule = Annotated[str, BeforeValidator(_in_one_line), AfterValidator(partial(_scheduled, choices=STYLES))]
SizeSchedule = Annotated[
    str, BeforeValidator(_in_one_line), AfterValidator(partial(_scheduled, choices=tuple(map(str, SIZES))))
]
CellName = Annotated[str, AfterValidator(lambda text: cell(text).name)]
Suite = Annotated[dict[CellName, Annotated[float, Field(ge=0)]], AfterValidator(_some_weight)]


class Task(Table):
    task: str = Field(min_length=1, description="`countdown`, FILE.py with a task of your own, or gym:NAME")
    puzzles: str = Field(
        min_length=1, description="file of puzzles to train or evaluate on: JSON Lines, CSV or Parquet; or `none`"
    )
    numbers: int = Field(ge=2, le=6, description="numbers in a puzzle")
    style: Literal["one-shot", "zero-shot", "natural"] = Field(description="how a puzzle is put to the model")
    operations: Annotated[str, AfterValidator(operations_in)] = Field(description="operations allowed: some of + - * /")
    min_number: int = Field(ge=1, le=1000, description="smallest number")
    max_number: int = Field(ge=1, le=1000, description="largest number")
    min_target: int = Field(ge=1, le=100_000, description="smallest target")
    max_target: int = Field(ge=1, le=100_000, description="largest target")
    use_all: bool = Field(description="use every number exactly once; else each at most once")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name in ("number", "target"):
            if getattr(self, f"min_{name}") > getattr(self, f"max_{name}"):
                raise ValueError(f"`min_{name}` is above `max_{name}`")
        return self

    @property
    def rules(self) -> Rules:
        """The rules of countdown that these settings make."""
        return Rules(self.operations, self.min_number, self.max_number, self.min_target, self.max_target, self.use_all)


class Model(Table):
    model: str = Field(min_length=1, description="`builtin`, a folder in Hugging Face format, a GGUF file, or a hub id")
    ref_model: str = Field(min_length=1, description="frozen reference of the KL penalty; `same` is the starting model")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(description="where the model runs")
    precision: Literal["auto", "float32", "bf16-master", "bf16"] = Field(
        description="weights in training; `bf16-master` adds float32 masters"
    )
    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switched)] = Field(
        description="trade time for memory in the backward pass; `auto` if it must"
    )
    reference: Literal["auto", "device", "host"] = Field(
        description="where the reference's weights live; `host` brings them for its pass"
    )
    memory: float = Field(ge=0, description="GB of memory to plan for; 0 is what is free")


class Train(Table):
    learning_rate: float = Field(gt=0, description="step size of the optimizer")
    schedule: Literal["constant", "linear", "cosine"] = Field(description="learning rate after the warm-up")
    warmup_steps: int = Field(ge=0, description="steps over which the learning rate rises from 0")
    batch_size: int = Field(ge=1, description="prompts per step")
    num_generations: int = Field(ge=2, description="completions per prompt: the size of a group")
    max_new_tokens: int = Field(ge=1, description="longest completion, in tokens")
    temperature: float = Field(gt=0, description="sampling temperature")
    num_iterations: int = Field(ge=1, description="training steps")
    num_inner_updates: int = Field(ge=1, description="updates of the policy per sampled batch")
    clip_grad_norm: float = Field(gt=0, description="largest gradient norm that is not scaled down")
    optimizer: Literal["auto", "adamw", "adamw8bit"] = Field(description="AdamW of torch, or in 8 bits of bitsandbytes")
    weight_decay: float = Field(ge=0, description="decoupled weight decay")
    prompt_style: StyleSchedule = Field(description="styles trained on, as a schedule; `task` is the one in [task]")
    prompt_numbers: SizeSchedule = Field(description="numbers trained on, as a schedule; `task` is those in [task]")
    dynamic_sampling: int = Field(
        ge=0, description="times that groups of equal rewards are sampled anew from other puzzles"
    )
    micro_batch_size: int = Field(ge=0, description="completions per forward and backward pass; 0 is as many as fit")
    seed: int = Field(ge=0, lt=2**32, description="seed of the puzzles drawn and of sampling")
    eval_every: int = Field(ge=1, description="steps between evaluations")
    eval_puzzles: int = Field(ge=0, description="val puzzles per evaluation; 0 is all of them")
    eval_suite: str = Field(
        min_length=1, description="suite that is evaluated too, and by which the best model is chosen; or `none`"
    )
    patience: int = Field(ge=0, description="evaluations without a better one after which to stop; 0 is never")
    save_every: int = Field(ge=1, description="steps between checkpoints")
    save_minutes: float = Field(ge=0, description="minutes after which the next step is saved too; 0 is never")
    keep_last: int = Field(ge=2, description="checkpoints to keep")
    deterministic: bool = Field(
        description="on a GPU, add up in a fixed order: the same run again bit for bit, but slower"
    )
    max_bad_steps: int = Field(ge=1, description="steps in a row without a finite loss and gradient that end the run")
    stop_on_collapse: bool = Field(description="end a run whose KL or length runs away, or that learns format alone")


class Loss(Table):
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo", "gspo"] = Field(
        description="ratio and normaliser of the loss"
    )
    beta: float = Field(ge=0, description="weight of the KL penalty")
    epsilon: float = Field(gt=0, lt=1, description="clip range below 1")
    epsilon_high: float = Field(gt=0, description="clip range above 1")
    kl_estimator: Literal["k3", "original"] = Field(description="estimate of the KL; `original` has the other sign")
    scale_rewards: Literal["group", "batch", "none"] = Field(description="whose standard deviation divides advantages")


class Reward(Table):
    format_reward: float = Field(ge=0, description="reward of each well-formed tag pair of a wrong answer")
    numbers_reward: float = Field(
        ge=0, description="reward of a wrong answer that uses the numbers as it must, added to that of its format"
    )
    correct_reward: float = Field(gt=0, description="reward of a right answer, in place of all others")

    reward: str = Field(min_length=1, description="FILE.py:function that rewards completions instead; or `none`")
    reward_errors: Literal["stop", "skip"] = Field(description="what an exception in it does: end the run, or reward 0")

    @property
    def weights(self) -> Rewards:
        """The same as plain data, for the task."""
        return Rewards(self.format_reward, self.numbers_reward, self.correct_reward)


class Eval(Table):
    split: Literal["train", "val"] = Field(description="where the puzzles come from")
    limit: int = Field(ge=0, description="puzzles to evaluate on, in each cell; 0 is all")
    samples: int = Field(ge=1, description="completions per puzzle, for pass@k")
    temperature: float = Field(ge=0, description="sampling temperature; 0 is greedy")
    max_new_tokens: int = Field(ge=1, description="longest completion, in tokens")
    batch_size: int = Field(ge=1, description="completions decoded at once")


class Plot(Table):
    smooth: bool = Field(description="draw moving averages")
    window: int = Field(ge=1, description="steps in a moving average")
    format: Literal["png", "svg"] = Field(description="image format of the curves")


class Ranks(Table):
    timeout: float = Field(gt=0, description="seconds that a process under torchrun may keep the others waiting")
    shard: bool = Field(description="spread weights, gradients and moments over the processes, for what does not fit")


class Settings(Table):
    """Every setting of one invocation; `preset` is the one chosen, never `auto`, once resolved."""

    preset: str = Field(
        min_length=1, description="settings for one model: `auto`, `builtin`, `qwen2.5-1.5b`, or your own"
    )
    runs: str = Field(min_length=1, description="folder of the runs")
    task: Task
    model: Model
    train: Train
    loss: Loss
    reward: Reward
    eval: Eval
    plot: Plot
    ranks: Ranks
    suite: dict[str, Suite] = Field(description="suites by name: their cells, each with its weight")


TABLES: dict[str, type[Table]] = {
    name: info.annotation
    for name, info in Settings.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Table)
}
FIELDS: dict[str, FieldInfo] = {
    name: info for name, info in Settings.model_fields.items() if name not in TABLES and name != "suite"
} | {f"{name}.{key}": info for name, table in TABLES.items() for key, info in table.model_fields.items()}

# What a run that goes on may change: its length, its logging, and where it computes. Tables, and single settings.
FREE = {"runs", "eval", "plot", "ranks", "model.device", "model.gradient_checkpointing"}
FREE |= {"model.reference", "model.memory", "train.num_iterations", "train.micro_batch_size", "train.eval_every"}
FREE |= {
    "train.save_minutes",
    "train.save_every",
    "train.keep_last",
    "train.max_bad_steps",
    "train.stop_on_collapse",
    "train.patience",
}


def values(settings: Settings) -> dict[str, object]:
    """Every setting, by key."""
    return {key: reduce(getattr, key.split("."), settings) for key in FIELDS}


def fixed(settings: Settings) -> dict[str, object]:
    """The settings that make a run what it is, by key."""
    free = {key for key in FIELDS if key in FREE or key.partition(".")[0] in FREE}
    kept = {key: value for key, value in values(settings).items() if key not in free}
    return kept | {"suite": settings.suite.get(settings.train.eval_suite)}


def digest(settings: Settings) -> str:
    """SHA-256 of the settings that make a run what it is."""
    return hashlib.sha256(json.dumps(fixed(settings), sort_keys=True).encode()).hexdigest()


def choices(key: str) -> tuple[str, ...]:
    """The values that a setting may take, or () where they cannot be listed."""
    return get_args(FIELDS[key].annotation)


def describe(key: str) -> str:
    """What a setting is, with its choices: its help on the command line and its comment in `config.toml`."""
    return ": ".join(filter(None, [FIELDS[key].description, ", ".join(choices(key))]))


def expected(key: str) -> str:
    """What a setting must be, to end the sentence `x must be ...`."""
    listed = choices(key)
    if listed:
        return "one of " + ", ".join(f"`{choice}`" for choice in listed)
    bounds = [
        f"{words} {getattr(limit, name)}"
        for limit in FIELDS[key].metadata
        for name, words in _BOUNDS.items()
        if hasattr(limit, name)
    ]
    return " ".join([_KINDS[FIELDS[key].annotation], " and ".join(bounds)]).rstrip()
