"""Every metric of a training, declared once: meaning, unit, format, and where it is shown.

`metrics.jsonl` holds metrics by name. The live table, figures, reports and docs/api.md use this list. A metric
with a `title`, `width` and `rank` is a column of the live table; `in_report` adds it to a report's health table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CHEATS = {  # kind -> what such completions do
    "numbers": "reach the target with numbers reused or left out",
    "not_arithmetic": "put text that is not an expression into the answer",
    "no_thought": "answer without the thought that the prompt asks for",
}

BEHAVIOUR = {  # how completions search -> meaning, unit
    "tries": ("tries of a completion: equations in its reasoning", ""),
    "distinct": ("different tries of a completion", ""),
    "parsed": ("the reasoning's lines with a try; low in prose, where the next say little", "share"),
    "slips": ("tries whose parts differ in value", "share"),
    "repeated": ("tries made before", "share"),
    "invented": ("tries with a number that is neither the puzzle's nor an earlier result", "share"),
    "verified": ("completions whose answer was computed to the target first", "share"),
    "gave_up": ("completions that end by themselves, wrong, and no try claimed the target", "share"),
}

SHARE, SECONDS, COUNT = "{:.1%}", "{:.2f}", "{:.0f}"
PHASE = "{:.2f}s"
SUITE = "suite/"  # prefix of a suite's cells


@dataclass(frozen=True)
class Metric:
    """A number of a step. A name that ends in `/` is a family: `suite/val 3 one-shot` belongs to `suite/`."""

    name: str
    meaning: str
    unit: str
    form: str
    title: str = ""  # column title in the live table
    width: int = 0
    rank: int = 0  # narrow terminals drop the highest first
    line_only: bool = False  # shown in the line of a step, not in the table
    in_report: bool = False

    @property
    def label(self) -> str:
        return self.title or self.name

    @property
    def axis(self) -> str:
        """The label of its axis in a plot."""
        return f"{self.label} ({self.unit})" if self.unit not in ("", "share") else self.label

    def show(self, value: float) -> str:
        return self.form.format(value)

    def cell(self, metrics: Mapping[str, float]) -> str:
        """Its value in a step's metrics, formatted, or `-`."""
        return self.show(metrics[self.name]) if self.name in metrics else "-"


METRICS = (
    Metric("step", "optimizer steps taken", "", COUNT, "step", 5, 0),
    Metric("reward", "mean reward of a completion", "", "{:.3f}", "reward", 6, 1),
    Metric("accuracy", "completions with a correct answer", "share", SHARE, "accuracy", 8, 2),
    Metric("format_rate", "completions with both tag pairs", "share", SHARE, "format", 6, 3),
    Metric("kl", "estimated KL divergence from the reference", "nats/token", "{:.4f}", "kl", 7, 4, in_report=True),
    Metric("loss", "policy loss plus the KL term", "", "{:.4g}"),
    Metric("entropy", "near 0, completions no longer differ", "nats/token", "{:.3f}", "entropy", 7, 8, in_report=True),
    Metric("completion_length", "mean length of a completion", "tokens", "{:.1f}", "length", 6, 5),
    Metric("truncated", "completions cut off at the token limit", "share", SHARE, "truncated", 9, 6, in_report=True),
    Metric("zero_variance", "groups of equal rewards: no gradient", "share", SHARE, "zero-var", 8, 9, in_report=True),
    Metric("clip_fraction", "tokens whose ratio was clipped", "share", SHARE, "clip", 5, 14),
    Metric("grad_norm", "norm of the gradient before clipping", "", "{:.3f}", "grad norm", 9, 10),
    Metric("weights_changed", "weights that the step changed", "share", SHARE, "changed", 7, 13, in_report=True),
    Metric(
        "logprob_gap", "sampled and trained log-probs: distance from plain ones", "nats/token", "{:.1e}", in_report=True
    ),
    Metric("sampler_gap", "mean distance of the trainer's log-probs from the sampler's", "nats/token", "{:.1e}"),
    Metric("learning_rate", "learning rate of the step", "", "{:.2g}"),
    Metric("bad_steps", "steps skipped so far: loss or gradient not finite", "", COUNT, in_report=True),
    Metric("lenient_accuracy", "correct answers in any notation", "share", SHARE, in_report=True),
    *(
        Metric(f"cheat/{kind}", f"completions that {act}", "share", SHARE, in_report=True)
        for kind, act in CHEATS.items()
    ),
    Metric("reward_margin", "reward of correct completions, less that of wrong ones", "", "{:.3f}"),
    Metric("advantage", "mean advantage of the step, without its sign: 0 if centred", "", "{:.2g}"),
    Metric("group_advantage", "largest mean advantage of a group: 0 if centred", "", "{:.2g}"),
    Metric("templated", "prompts that follow the model's chat template", "share", SHARE),
    Metric("loss_tokens", "tokens in the loss over tokens sampled: 1 if the mask is right", "", "{:.3f}"),
    Metric("reward/", "mean of a named part of the reward", "", "{:.3f}"),
    Metric("distinct", "different completions of a group", "share", SHARE, in_report=True),
    *(
        Metric(f"behaviour/{name}", meaning, unit, SHARE if unit else "{:.1f}", in_report=True)
        for name, (meaning, unit) in BEHAVIOUR.items()
    ),
    Metric("prompts/", "prompts of a style or size, if mixed", "share", SHARE),
    Metric("refilled", "groups that dynamic sampling replaced", "share", SHARE),
    Metric("tokens_per_second", "tokens sampled in the step over its time", "1/s", "{:,.0f}", "tok/s", 7, 11),
    Metric("mfu", "model FLOP utilization, where it is known", "share", SHARE, "mfu", 6, 12),
    Metric("padding", "token positions of the rollout computed in vain", "share", SHARE),
    Metric("peak_memory", "peak of the step on CUDA, else of the process", "GB", SECONDS),
    Metric("time/total", "the whole step", "s", SECONDS, "s/step", 6, 7),
    Metric("time/rollout", "sampling", "s", PHASE, "rollout", 6, 15, line_only=True),
    Metric("time/score", "decoding and scoring", "s", PHASE, "score", 6, 16, line_only=True),
    Metric("time/reference", "log-probs of the reference", "s", PHASE, "reference", 6, 17, line_only=True),
    Metric("time/update", "forward and backward passes", "s", PHASE, "update", 6, 18, line_only=True),
    Metric("time/", "prefill, decode, optimizer, reduce, wait, eval, suite", "s", SECONDS),
    Metric("val_accuracy", "greedy accuracy on the val puzzles, only reported", "share", SHARE),
    Metric("dev_accuracy", "greedy accuracy on dev puzzles, chooses the best", "share", SHARE),
    Metric("val_sampled", "accuracy of completions sampled for the val puzzles", "share", SHARE, in_report=True),
    Metric("val_sampled_low", "lower end of its 95 % interval", "share", SHARE),
    Metric("val_sampled_high", "upper end of its 95 % interval", "share", SHARE),
    Metric("val_pass_at_k", "val puzzles that any of these completions solves", "share", SHARE, in_report=True),
    Metric(SUITE, "greedy accuracy on a cell of the suite", "share", SHARE),
    Metric("suite_mean", "weighted mean over the suite", "share", SHARE),
)
_BY_NAME = {one.name: one for one in METRICS}

TABLE = tuple(one for one in METRICS if one.title and not one.line_only)
PHASES = tuple(one for one in METRICS if one.line_only)


def metric(name: str) -> Metric:
    """The declaration of a metric or of its family; raises KeyError if there is none."""
    return _BY_NAME[name] if name in _BY_NAME else _BY_NAME[f"{name.partition('/')[0]}/"]


def evaluations(metrics: Iterable[Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    """The lines of a run's metrics with an evaluation, by step."""
    return {int(line["step"]): line for line in metrics if "val_accuracy" in line}


def best_step(metrics: Iterable[Mapping[str, float]]) -> int:
    """The step of a run's best model, the first that is best on dev; 0 before a trained one was evaluated."""
    scores = {int(line["step"]): line["dev_accuracy"] for line in metrics if line["step"] and "dev_accuracy" in line}
    return max(scores, key=lambda step: (scores[step], -step), default=0)
