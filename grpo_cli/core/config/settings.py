"""Declare every setting once: name, type, bounds, help, panel, and whether a resumed run may change it.

Flag, TOML key and environment variable share the name; `config.toml` has the default.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial, reduce
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args
from urllib.parse import urlsplit

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
    """One table of `config.toml`. Strict: `true` is not a number, 1.0 not a whole number, infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    panel: ClassVar[str] = ""  # in the help, of settings without their own


def setting(
    description: str, panel: str = "", *, resumable: bool = False, common: bool = False, **bounds: float
) -> Any:
    """A setting: its help text, its panel in the help if not its table's, its bounds.

    `resumable`: a resumed run may change it. `common`: the help of a command with many settings shows it.
    """
    extra: dict[str, Any] = {"panel": panel, "resumable": resumable, "common": common}
    return Field(description=description, json_schema_extra=extra, **cast("Any", bounds))


def in_one_line(value: object) -> object:
    """Convert a table of weights, or a single number, to the text of a schedule."""
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


def _server(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_server = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of brackets or the port
        is_server = False
    if url != "none" and not is_server:
        raise ValueError("must be an address like http://localhost:8000")
    return url.rstrip("/")


def _greedy_or_not(temperature: float) -> float:
    if 0 < temperature < 0.001:
        raise ValueError("must be 0, which is greedy, or at least 0.001")
    return temperature


PathText = Annotated[str, AfterValidator(os.path.expanduser)]
StyleSchedule = Annotated[str, BeforeValidator(in_one_line), AfterValidator(partial(_scheduled, choices=STYLES))]
SizeSchedule = Annotated[
    str, BeforeValidator(in_one_line), AfterValidator(partial(_scheduled, choices=tuple(map(str, SIZES))))
]
CellName = Annotated[str, AfterValidator(lambda text: cell(text).name)]
Suite = Annotated[dict[CellName, Annotated[float, Field(ge=0)]], AfterValidator(_some_weight)]


class Task(Table):
    panel: ClassVar[str] = "Sampling"

    task: PathText = setting("`countdown`, FILE.py with your own task, or gym:NAME", min_length=1, common=True)
    puzzles: PathText = setting(
        "file of puzzles to train or evaluate on: JSON Lines, CSV or Parquet; or `none`", min_length=1, common=True
    )
    dev_puzzles: PathText = setting("file of puzzles that select the best model; `none`: a part of train", min_length=1)
    val_puzzles: PathText = setting("file of val puzzles to report accuracy on; or `none`", min_length=1)
    numbers: int = setting("numbers in a puzzle", ge=2, le=6, common=True)
    style: Literal["one-shot", "zero-shot", "natural"] = setting("prompt style", common=True)
    operations: Annotated[str, AfterValidator(operations_in)] = setting("operations allowed: some of + - * /")
    min_number: int = setting("smallest number", ge=1, le=1000)
    max_number: int = setting("largest number", ge=1, le=1000)
    min_target: int = setting("smallest target", ge=1, le=100_000)
    max_target: int = setting("largest target", ge=1, le=100_000)
    use_all: bool = setting("use every number exactly once; else each at most once")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name in ("number", "target"):
            if getattr(self, f"min_{name}") > getattr(self, f"max_{name}"):
                raise ValueError(f"`min_{name}` is larger than `max_{name}`")
        return self

    @property
    def rules(self) -> Rules:
        """The rules of countdown as set here."""
        return Rules(self.operations, self.min_number, self.max_number, self.min_target, self.max_target, self.use_all)


class Model(Table):
    panel: ClassVar[str] = "Model"

    model: PathText = setting(
        "`builtin`, a folder in Hugging Face format, a GGUF file, or a hub id", min_length=1, common=True
    )
    ref_model: PathText = setting("frozen reference of the KL penalty; `same`: the starting model", min_length=1)
    device: Literal["auto", "cuda", "mps", "cpu"] = setting("where the model runs", resumable=True, common=True)
    precision: Literal["auto", "float32", "bf16-master", "bf16"] = setting(
        "weight dtype; `bf16-master` adds float32 masters", common=True
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = setting(
        "trade time for memory in the backward pass; `auto`: if needed", resumable=True
    )
    reference: Literal["auto", "device", "host"] = setting(
        "where the reference model is kept; `host`: in RAM", resumable=True
    )
    lora_rank: int = setting("rank of the LoRA adapter; 0 trains all weights instead", ge=0, le=4096, common=True)
    lora_alpha: float = setting("LoRA alpha: the adapter is scaled by alpha / rank", gt=0, le=10**6)
    lora_targets: str = setting("linear layers to adapt, such as q_proj, v_proj; or `all`", min_length=1)
    quantize: Literal["none", "nf4"] = setting("quantize the base model under a LoRA adapter to 4 bits")
    memory: float = setting(
        "memory budget in GB; 0 is 95% of free GPU memory, or 70% of free RAM",
        ge=0,
        le=10**9,
        resumable=True,
        common=True,
    )
    rollout: Literal["local", "vllm"] = setting(
        "what samples completions; `vllm`: the extra of that name", resumable=True
    )
    vllm_memory: float = setting("share of GPU memory that vLLM takes", gt=0, lt=1, resumable=True)
    vllm_url: Annotated[str, AfterValidator(_server)] = setting(
        "sample with the vLLM server at this address; `none`: in this process", min_length=1, resumable=True
    )
    vllm_folder: PathText = setting(
        "folder where a vLLM server finds new weights; `none`: the system's for temporary files",
        min_length=1,
        resumable=True,
    )
    threads: int = setting("CPU threads; 0 is one per core", ge=0, le=4096, resumable=True)


class Train(Table):
    panel: ClassVar[str] = "Schedule"

    learning_rate: float = setting("peak learning rate", "Optimization", gt=0, le=1000, common=True)
    schedule: Literal["constant", "linear", "cosine"] = setting("learning rate schedule after warm-up", "Optimization")
    warmup_steps: int = setting("steps of linear learning rate warm-up", "Optimization", ge=0, le=10**12)
    batch_size: int = setting("prompts per step", "Sampling", ge=1, le=10_000, common=True)
    num_generations: int = setting(
        "completions per prompt: the size of a group", "Sampling", ge=2, le=10_000, common=True
    )
    max_new_tokens: int = setting("longest completion, in tokens", "Sampling", ge=1, le=100_000, common=True)
    temperature: float = setting("sampling temperature", "Sampling", ge=0.001, le=10**6, common=True)
    num_iterations: int = setting("training steps", ge=1, le=10**12, resumable=True, common=True)
    num_inner_updates: int = setting("updates of the policy per sampled batch", "Optimization", ge=1, le=10**6)
    num_mini_batches: int = setting(
        "parts of a sampled batch, each with an update of its own", "Optimization", ge=1, le=10_000
    )
    clip_grad_norm: float = setting("maximum gradient norm", "Optimization", gt=0, le=10**9)
    optimizer: Literal["auto", "adamw", "adamw8bit"] = setting(
        "AdamW of torch, or 8-bit AdamW of bitsandbytes", "Optimization"
    )
    weight_decay: float = setting("decoupled weight decay", "Optimization", ge=0, le=1000)
    prompt_style: StyleSchedule = setting("schedule of prompt styles; `task` is the style above", "Sampling")
    prompt_numbers: SizeSchedule = setting("schedule of puzzle sizes; `task` is the number above", "Sampling")
    warm_start: int = setting(
        "worked solutions to fine-tune on before GRPO; 0 is none", "Optimization", ge=0, le=10**6, common=True
    )
    warm_start_impatient: int = setting(
        "how many of them are shown again and mostly give up after five failed tries", "Optimization", ge=0, le=10**6
    )
    dynamic_sampling: int = setting(
        "rounds of replacing groups with equal rewards by new puzzles", "Sampling", ge=0, le=20
    )
    micro_batch_size: int = setting(
        "completions per forward and backward pass; 0 is as many as fit", "Optimization", ge=0, le=10**9, resumable=True
    )
    seed: int = setting("seed of the puzzles drawn and of sampling", "Sampling", ge=0, lt=2**32, common=True)
    eval_every: int = setting("steps between evaluations", ge=1, resumable=True, common=True)
    eval_puzzles: int = setting("val puzzles per evaluation; 0 is all of them", ge=0, le=10**12)
    eval_samples: int = setting(
        "completions sampled per val puzzle, beside the greedy one, for pass@k; 0 is none",
        ge=0,
        le=10**6,
        resumable=True,
    )
    eval_suite: str = setting("suite to evaluate too; its mean on dev selects the best model; or `none`", min_length=1)
    patience: int = setting("stop after this many evaluations without improvement; 0 is never", ge=0, resumable=True)
    save_every: int = setting("steps between checkpoints", ge=1, resumable=True)
    save_minutes: float = setting(
        "minutes between checkpoints, besides save_every; 0 is never", ge=0, le=10**12, resumable=True
    )
    keep_last: int = setting("checkpoints to keep", ge=2, resumable=True)
    keep_groups: int = setting(
        "groups of each step to keep, for `countdown why`; -1 is all", "Output", ge=-1, resumable=True
    )
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = setting(
        "experiment tracker to log to", "Output", resumable=True, common=True
    )
    deterministic: bool = setting("on a GPU: runs repeat bit for bit, but are slower")
    max_bad_steps: int = setting(
        "stop after this many consecutive steps with a non-finite loss or gradient", ge=1, resumable=True
    )
    stop_on_collapse: bool = setting("stop when KL or length explodes, or only the format is learned", resumable=True)
    broken: Literal[
        "none", "kl", "end", "temperature", "groups", "baseline", "prompt", "bf16", "template", "reward", "mystery"
    ] = setting("plant a bug, for docs/labs.md; `mystery` draws one")

    @model_validator(mode="after")
    def _impatient_searches_are_some_of_all(self) -> Self:
        if 0 < self.warm_start < self.warm_start_impatient:
            raise ValueError("`warm_start_impatient` must be at most `warm_start`, of which it shows some again")
        return self


class Loss(Table):
    panel: ClassVar[str] = "Loss"

    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo", "gspo"] = setting(
        "ratio and normaliser of the loss", common=True
    )
    beta: float = setting("weight of the KL penalty", ge=0, le=10**6, common=True)
    epsilon: float = setting("clip range below 1", gt=0, lt=1)
    epsilon_high: float = setting("clip range above 1", gt=0, le=10**9)
    dual_clip: float = setting("largest ratio of a completion with a negative advantage; 0 is no limit", ge=0, le=10**9)
    ratio_level: Literal["auto", "token", "sequence"] = setting(
        "one ratio per token or per sequence; `auto`: sequence for gspo"
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased", "original"] = setting(
        "KL estimator; `original` flips a sign"
    )
    kl_in: Literal["loss", "reward"] = setting("where the KL penalty is added")
    scale_rewards: Literal["group", "batch", "none", "mean"] = setting(
        "divide advantages by a standard deviation, or by the group's mean"
    )
    baseline: Literal["mean", "leave_one_out"] = setting(
        "subtract the mean reward of the group, or of its other completions"
    )
    pass_at_k: int = setting("train the best of this many completions; 1 is each by itself", ge=1, le=10_000)
    mask_truncated: bool = setting("leave completions that reach the token limit out of the loss")
    entropy_share: float = setting("share of tokens that learn, those with the highest entropy; 1 is all", gt=0, le=1)
    entropy_bonus: float = setting("weight of the mean entropy, which is maximised", ge=0, le=10**6)
    sampler_correction: Literal["auto", "none", "truncate", "mask"] = setting(
        "weigh tokens by trainer over sampler; `auto`: truncate if they differ"
    )
    sampler_level: Literal["token", "sequence"] = setting("one such weight for each")
    sampler_cap: float = setting("largest such weight", gt=0, le=10**9)

    @property
    def always_has_gradient(self) -> bool:
        """Whether completions without an advantage have a gradient too."""
        return (self.beta > 0 and self.kl_in == "loss") or self.entropy_bonus > 0

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if self.dual_clip and self.dual_clip <= 1 + self.epsilon_high:
            raise ValueError(f"`dual_clip` must be 0 or more than 1 + `epsilon_high`, {1 + self.epsilon_high:g}")
        if self.pass_at_k > 1 and self.baseline != "mean":
            raise ValueError("`pass_at_k` has its own baseline: leave `baseline` at `mean`")
        if self.pass_at_k > 1 and self.scale_rewards == "batch":
            raise ValueError("`pass_at_k` has the deviation of its group: `scale_rewards` cannot be `batch`")
        return self


class Reward(Table):
    panel: ClassVar[str] = "Loss"

    format_reward: float = setting("reward of each well-formed tag pair of a wrong answer", ge=0, le=10**6)
    numbers_reward: float = setting(
        "reward added to format_reward if a wrong answer uses the right numbers", ge=0, le=10**6
    )
    correct_reward: float = setting("reward of a correct answer, instead of all others", gt=0, le=10**6)
    length_penalty: float = setting(
        "penalty at max_new_tokens (1 in DAPO's soft overlong punishment); 0 is none", ge=0, le=10**6
    )
    soft_limit: int = setting("length in tokens above which length_penalty applies", ge=0)
    reward: PathText = setting("FILE.py:function, your own reward function; or `none`", min_length=1, common=True)
    reward_errors: Literal["stop", "skip"] = setting("exception in your reward function: end the run, or reward 0")

    @property
    def weights(self) -> Rewards:
        """The amounts as plain data, for the task."""
        return Rewards(self.format_reward, self.numbers_reward, self.correct_reward)


class Eval(Table):
    panel: ClassVar[str] = "Sampling"

    split: Literal["train", "dev", "val"] = setting("split to evaluate on", resumable=True)
    limit: int = setting("puzzles to evaluate on, in each cell; 0 is all", ge=0, le=10**12, resumable=True)
    samples: int = setting("completions per puzzle, for pass@k", ge=1, le=10**6, resumable=True)
    temperature: Annotated[float, AfterValidator(_greedy_or_not)] = setting(
        "sampling temperature; 0 is greedy", ge=0, le=1000, resumable=True
    )
    max_new_tokens: int = setting("longest completion, in tokens", ge=1, le=100_000, resumable=True)
    batch_size: int = setting("completions decoded at once", ge=1, le=10**6, resumable=True)


class Plot(Table):
    panel: ClassVar[str] = "Output"

    smooth: bool = setting("draw moving averages", resumable=True)
    window: int = setting("steps in a moving average", ge=1, le=10**12, resumable=True)
    format: Literal["png", "svg"] = setting("image format of the curves", resumable=True)

    @property
    def averaged(self) -> int:
        """Steps that a point of a training curve is the mean of."""
        return self.window if self.smooth else 1


class Ranks(Table):
    panel: ClassVar[str] = "Ranks"

    timeout: float = setting(
        "seconds to wait for other processes: ranks, or a vLLM server", gt=0, le=10**9, resumable=True
    )
    shard: bool = setting("shard weights, gradients and optimizer state over processes (FSDP)", resumable=True)


class Settings(Table):
    """All settings of one invocation; after `resolve`, `preset` is never `auto`."""

    preset: str = setting(
        "preset of settings for a model: `auto`, a shipped one, or your own", "Model", min_length=1, common=True
    )
    runs: PathText = setting("folder of the runs", "Output", min_length=1, resumable=True)
    task: Task
    model: Model
    train: Train
    loss: Loss
    reward: Reward
    eval: Eval
    plot: Plot
    ranks: Ranks
    suite: dict[str, Suite] = Field(description="suites by name: their cells, each with its weight")

    @model_validator(mode="after")
    def _soft_limit_is_below_the_hard_one(self) -> Self:
        if self.reward.length_penalty and self.reward.soft_limit >= self.train.max_new_tokens:
            raise ValueError(f"`soft_limit` must be less than `max_new_tokens`, {self.train.max_new_tokens}")
        return self

    @model_validator(mode="after")
    def _groups_can_be_split(self) -> Self:
        if self.loss.pass_at_k > self.train.num_generations:
            raise ValueError(f"`pass_at_k` must be at most `num_generations`, {self.train.num_generations}")
        if self.train.batch_size % self.train.num_mini_batches:
            raise ValueError(f"`num_mini_batches` must divide `batch_size`, {self.train.batch_size}")
        return self


TABLES: dict[str, type[Table]] = {
    name: info.annotation
    for name, info in Settings.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Table)
}
FIELDS: dict[str, FieldInfo] = {
    name: info for name, info in Settings.model_fields.items() if name not in TABLES and name != "suite"
} | {f"{name}.{key}": info for name, table in TABLES.items() for key, info in table.model_fields.items()}


# A setting, the values of it that give other settings their effect, and those others.
NEEDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("model.lora_rank", bool, ("model.lora_alpha", "model.lora_targets", "model.quantize")),
    ("loss.beta", bool, ("loss.kl_estimator", "loss.kl_in", "model.ref_model", "model.reference")),
    ("loss.kl_in", "loss".__eq__, ("loss.kl_estimator",)),  # a KL in the reward is k1
    ("loss.loss_type", "cispo".__ne__, ("loss.epsilon", "loss.dual_clip")),
    ("model.rollout", "vllm".__eq__, ("model.vllm_memory", "model.vllm_url")),
    ("model.vllm_url", "none".__ne__, ("model.vllm_folder",)),
    ("loss.sampler_correction", "none".__ne__, ("loss.sampler_level", "loss.sampler_cap")),
    ("reward.length_penalty", bool, ("reward.soft_limit",)),
    ("reward.reward", "none".__ne__, ("reward.reward_errors",)),
    ("reward.reward", "none".__eq__, ("reward.format_reward", "reward.numbers_reward", "reward.correct_reward")),
    ("train.warm_start", bool, ("train.warm_start_impatient",)),
    ("plot.smooth", bool, ("plot.window",)),
    ("task.puzzles", "none".__eq__, ("task.numbers", "train.prompt_numbers", "train.warm_start")),
    (
        "task.task",
        "countdown".__eq__,
        (
            *(f"task.{name}" for name in Task.model_fields if name != "task"),
            *("train.prompt_style", "train.prompt_numbers", "train.warm_start"),
            *("reward.format_reward", "reward.numbers_reward", "reward.correct_reward"),
        ),
    ),
)


def values(settings: Settings) -> dict[str, object]:
    """All settings by key."""
    return {key: reduce(getattr, key.split("."), settings) for key in FIELDS}


def fixed(settings: Settings) -> dict[str, object]:
    """The settings that a resumed run must keep, by key."""
    kept = {key: value for key, value in values(settings).items() if not _declared(key).get("resumable")}
    return kept | {"suite": settings.suite.get(settings.train.eval_suite)}


def changeable(settings: Settings) -> dict[str, object]:
    """The settings that a resumed run may change, by key."""
    return {key: value for key, value in values(settings).items() if _declared(key).get("resumable")}


def digest(settings: Settings) -> str:
    """SHA-256 of the settings that a resumed run must keep."""
    return hashlib.sha256(json.dumps(fixed(settings), sort_keys=True).encode()).hexdigest()


def _declared(key: str) -> dict[str, Any]:
    return cast("dict[str, Any]", FIELDS[key].json_schema_extra)


def is_common(key: str) -> bool:
    """Whether the help of a command with many settings shows this one."""
    return bool(_declared(key)["common"])


def panel(key: str) -> str:
    """The panel of a setting in the help."""
    return str(_declared(key)["panel"] or TABLES[key.partition(".")[0]].panel)


def choices(key: str) -> tuple[str, ...]:
    """The valid values of a setting, or () if they cannot be listed."""
    return get_args(FIELDS[key].annotation)


def describe(key: str) -> str:
    """A setting's description and choices, for its help and its comment in `config.toml`."""
    return ": ".join(filter(None, [FIELDS[key].description, ", ".join(choices(key))]))


def expected(key: str) -> str:
    """The end of the sentence `x must be ...`."""
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
