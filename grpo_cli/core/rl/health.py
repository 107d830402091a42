"""Rules about metrics: whether a training has collapsed or is unhealthy, how it learns, and the page on each.

RULES is the one table: a training warns by it; the probe, the report and `countdown why` read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean, median
from typing import Any

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.metrics import CHEATS

WINDOW = 20  # steps per judgement
KL_LIMIT = 1.0  # nats per token; healthy trainings stay far below
TRUNCATED_LIMIT = 0.9  # share of completions
# Nats per token between sampler or trainer and the model's own forward; rounding gives 1e-6 in float32 and up to
# 0.07 in bfloat16 (SmolLM2-135M). The limit is twice that rounding, and less than the clip range.
GAP_LIMIT = 0.15
EQUAL_LIMIT = 0.9  # share of groups whose rewards are all equal
LEARNED = 0.9  # accuracy above which equal rewards and low entropy are fine
CUT_LIMIT = 0.3  # share of completions; truncated ones cannot be correct
ENTROPY_LIMIT = 0.01  # nats a token
ENTROPY_LEFT = 0.1  # share of the entropy in the first window
CLIPPED_LIMIT = 1e-3  # share of tokens
MOVED_LIMIT = 0.1  # share of weights; float32 changes nearly all, bf16 a few percent if steps are small
NOTATION_LIMIT = 0.1  # share of completions that are correct except for their notation
FORMAT_GAIN = 0.2  # rise of the format rate that, with a tenth of it in accuracy, is only the format
LINEAR = ("grpo", "gspo", "dapo", "dr_grpo")  # loss types of value -weight * advantage at ratio 1
GAVE_UP_LIMIT = 0.5  # share of completions
TRIES_LEFT = 0.75  # of the tries of the first window
CHEAT_LIMIT = 0.1  # share of completions, and twice as many as in the first window
MARGIN_LIMIT = 0.05  # of the mean reward: how much more correct completions must earn
EXACT = 1e-4  # distance from what arithmetic makes exact, up to rounding
SAMPLER_GAP = 1e-3  # nats per token, above which `auto` corrects: float32 rounds to 1e-6, bfloat16 to 1e-2

Line = Mapping[str, float]


@dataclass(frozen=True)
class Window:
    """The last and the first steps of a training; an item is the mean of a metric over the last, nan without any.

    A word before the metric asks for something else: `first`: the mean over the first steps, `median`, `max` and
    `latest`: of the last steps, `learning`: the median of the last steps with a gradient, at least half of them.
    `steps`: the number of the last steps.
    """

    late: Sequence[Line]
    early: Sequence[Line]

    def __getitem__(self, key: str) -> float:
        if key == "steps":
            return len(self.late)
        word, _, name = key.rpartition(" ")
        steps = self.early if word == "first" else self.late
        if word == "learning":
            steps = [step for step in steps if step.get("zero_variance", 0) != 1]
        values = [step[name] for step in steps if name in step]
        if not values or 2 * len(values) < len(self.late) * (word == "learning"):
            return nan
        if word == "latest":
            return values[-1]
        if word == "max":
            return max(values)
        return median(values) if word in ("median", "learning") else fmean(values)


@dataclass(frozen=True)
class Rule:
    """A sentence about a window, its metrics in braces, and when it holds.

    `collapse`: the training has failed for good. `unless`: rules that explain it. `from_first_step`: judged
    from the first step on, because chance cannot make it hold.
    """

    name: str
    holds: Callable[[Window], bool]
    sentence: str
    page: str = "docs/training.md"
    collapse: bool = False
    unless: tuple[str, ...] = ()
    from_first_step: bool = False


def _equal(window: Window, low: float, high: float) -> bool:
    """Whether nearly all groups have equal rewards, at an accuracy in this range."""
    return window["zero_variance"] > EQUAL_LIMIT and low <= window["accuracy"] <= high


def _entropy_fell(window: Window) -> bool:
    """Whether completions hardly differ any more, without being correct."""
    limit = min(ENTROPY_LIMIT, ENTROPY_LEFT * window["first entropy"])
    return window["entropy"] < limit and window["accuracy"] < LEARNED


def _cheat(kind: str) -> Rule:
    name = f"cheat/{kind}"
    return Rule(
        name,
        lambda window: window[name] > max(CHEAT_LIMIT, 2 * window[f"first {name}"]),
        f"{{{name}:.0%}} of the completions {CHEATS[kind]}, {{first {name}:.0%}} at first: see `samples.jsonl`; to stay"
        " closer to the starting model, raise `--beta` or lower `--learning-rate`",
    )


RULES = (  # causes before symptoms
    Rule(
        "failed",
        lambda window: window["reward/failed"] > 0,
        "scoring failed for {reward/failed:.1%} of the completions, which got reward 0: see the exception with"
        " `--reward-errors stop`",
        "docs/data.md",
        from_first_step=True,
    ),
    Rule(
        "template",
        lambda window: window["templated"] < 1,
        "{templated:.0%} of the prompts follow the model's chat template: the model reads text that it was not trained"
        " on",
        "docs/labs.md",
        from_first_step=True,
    ),
    Rule(
        "mask",
        lambda window: abs(window["loss_tokens"] - 1) > EXACT,
        "the loss covers {loss_tokens:.3f} tokens for each token sampled: below 1, completions or their ends are not"
        " learned; above 1, prompts are",
        "docs/labs.md",
        from_first_step=True,
    ),
    Rule(
        "baseline",
        lambda window: window["advantage"] > EXACT,
        "the advantages of a step have a mean of {advantage:.2g}, not 0: no baseline is subtracted, so whatever was"
        " sampled becomes more likely",
        "docs/labs.md",
        from_first_step=True,
    ),
    Rule(
        "groups",
        lambda window: window["group_advantage"] > EXACT,
        "the advantages of a group have a mean of up to {group_advantage:.2g}, those of the step 0: completions are"
        " compared with those of other prompts",
        "docs/labs.md",
        unless=("baseline",),
        from_first_step=True,
    ),
    Rule(
        "margin",
        lambda window: window["reward_margin"] <= MARGIN_LIMIT * abs(window["reward"]),
        "correct completions earn {reward_margin:.2g} more than wrong ones, at a mean reward of {reward:.2g}: the"
        " reward does not ask for correct answers; check `--reward`, or lower `--format-reward`",
        "docs/data.md",
    ),
    Rule(
        "kl",
        lambda window: window["median kl"] > KL_LIMIT,
        "the KL from the reference has exploded ({median kl:.2g} per token): lower `--learning-rate`, or raise"
        " `--beta`",
        collapse=True,
    ),
    Rule(
        "length",
        lambda window: window["truncated"] > TRUNCATED_LIMIT and window["first truncated"] < TRUNCATED_LIMIT / 2,
        "completions have grown: {truncated:.0%} of them reach the token limit: lower `--learning-rate`, or raise"
        " `--max-new-tokens`",
        collapse=True,
    ),
    Rule(
        "truncated",
        lambda window: window["truncated"] > CUT_LIMIT,
        "{truncated:.0%} of the completions reach the token limit, so they cannot be correct: raise `--max-new-tokens`",
        unless=("length",),
    ),
    Rule(
        "gap",
        lambda window: window["median logprob_gap"] > GAP_LIMIT,
        "sampling or training differs from the model's own forward by {median logprob_gap:.2g} nats per token; rounding"
        " explains 0.07, so training does not optimize this model: try `--precision float32`",
        "docs/models.md",
    ),
    Rule(
        "moved",
        lambda window: window["learning weights_changed"] < MOVED_LIMIT,
        "a step changes {learning weights_changed:.1%} of the weights; smaller updates are rounded away: train with"
        " `--precision bf16-master`, or raise `--learning-rate`",
        "docs/gpus.md",
    ),
    Rule(
        "format",
        lambda window: window["format_rate"] > 0.99 and window["max accuracy"] == 0,
        "in {steps} steps every completion was well formed and none was correct, so only the format is learned: start"
        " from a model that solves some puzzles, or use fewer `--numbers`",
        "docs/models.md",
        collapse=True,
    ),
    Rule(
        "trap",
        lambda window: (
            window["format_rate"] - window["first format_rate"] > FORMAT_GAIN
            and window["accuracy"] - window["first accuracy"] < FORMAT_GAIN / 10
        ),
        "the format was learned ({first format_rate:.0%} -> {format_rate:.0%}) and the task was not"
        " ({first accuracy:.0%} -> {accuracy:.0%}): start from a model that solves some puzzles, use fewer `--numbers`,"
        " or lower `--format-reward`",
        "docs/models.md",
        unless=("format",),
    ),
    Rule(
        "gave_up",
        lambda window: (
            window["behaviour/gave_up"] > GAVE_UP_LIMIT
            and window["behaviour/tries"] < TRIES_LEFT * window["first behaviour/tries"]
            and window["accuracy"] <= window["first accuracy"]
        ),
        "completions give up sooner, after {first behaviour/tries:.1f} -> {behaviour/tries:.1f} tries, and"
        " {accuracy:.0%} are correct: going on does not pay; start from a model whose tries are right more often, or"
        " lower `--format-reward`",
        "docs/why.md",
        unless=("format", "trap"),
    ),
    Rule(
        "right",
        lambda window: _equal(window, LEARNED, 1),
        "{accuracy:.0%} of the completions are correct: nothing is left to learn from these puzzles; stop, or use"
        " harder ones with `--numbers`",
        "docs/measurements.md",
        unless=("margin",),
    ),
    Rule(
        "wrong",
        lambda window: _equal(window, 0, 1 - LEARNED),
        "{zero_variance:.0%} of the groups have equal rewards and {accuracy:.0%} of the completions are correct, so"
        " little is learned: start from a model that solves some puzzles, or use fewer `--numbers`",
        "docs/models.md",
        unless=("format", "length", "truncated", "margin"),
    ),
    Rule(
        "settled",
        lambda window: _equal(window, 1 - LEARNED, LEARNED),
        "{zero_variance:.0%} of the groups have equal rewards: each puzzle is always solved or never, so little is"
        " learned; raise `--num-generations` or `--temperature`",
        unless=("margin", "right", "wrong"),
    ),
    Rule(
        "clipped",
        lambda window: _entropy_fell(window) and window["clip_fraction"] > CLIPPED_LIMIT,
        "the entropy fell from {first entropy:.2g} to {entropy:.2g} nats per token at an accuracy of {accuracy:.0%},"
        " and {clip_fraction:.1%} of the tokens are clipped, perhaps rare ones that should grow: raise"
        " `--epsilon-high`, or lower `--learning-rate`",
        "docs/one-step.md",
    ),
    Rule(
        "entropy",
        _entropy_fell,
        "the entropy fell from {first entropy:.2g} to {entropy:.2g} nats per token at an accuracy of {accuracy:.0%}:"
        " completions hardly differ any more; lower `--learning-rate`, or raise `--temperature` or `--beta`",
        unless=("clipped",),
    ),
    Rule(
        "notation",
        lambda window: window["lenient_accuracy"] - window["accuracy"] > NOTATION_LIMIT,
        "{lenient_accuracy:.0%} of the completions are correct in any notation, such as `×` or a trailing `= 13`, and"
        " {accuracy:.0%} as the task asks: show the notation with `--style one-shot`",
    ),
    *map(_cheat, CHEATS),
)

FACTS = (  # of every run
    Rule(
        "gradient",
        lambda window: window["zero_variance"] >= 0,
        "{zero_variance:.0%} of the groups had equal rewards, and so no gradient",
        "docs/one-step.md",
    ),
    Rule(
        "progress",
        lambda window: window["reward"] == window["reward"],
        "reward {first reward:.2f} -> {reward:.2f}, accuracy {first accuracy:.2f} -> {accuracy:.2f}, format"
        " {first format_rate:.2f} -> {format_rate:.2f}",
    ),
    Rule(
        "loss",
        lambda window: window["loss"] == window["loss"],
        "{loss:.2g}, which does not measure progress: at ratio 1 it is 0, or says only whether better completions are"
        " longer; the gradient's norm is {grad_norm:.2g}",
        "docs/why.md",
    ),
    Rule(
        "limit",
        lambda window: window["completion_length"] >= 0,
        "completions have {completion_length:.0f} tokens on average; {truncated:.0%} reach the limit",
    ),
    Rule(
        "entropy",
        lambda window: window["entropy"] >= 0,
        "{first entropy:.2g} -> {entropy:.2g} nats per token",
        "docs/why.md",
        unless=("entropy", "clipped"),
    ),
    Rule("kl", lambda window: window["kl"] >= 0, "{kl:.2g} nats per token from the reference", unless=("kl",)),
    Rule(
        "search",
        lambda window: window["behaviour/tries"] >= 0,
        "{first behaviour/tries:.1f} -> {behaviour/tries:.1f} tries a completion, gave up"
        " {first behaviour/gave_up:.0%} -> {behaviour/gave_up:.0%}, tries with a slip {first behaviour/slips:.0%} ->"
        " {behaviour/slips:.0%}, repeated tries {first behaviour/repeated:.0%} -> {behaviour/repeated:.0%}, lines read"
        " {first behaviour/parsed:.0%} -> {behaviour/parsed:.0%}",
        "docs/why.md",
    ),
    Rule(
        "selection",
        lambda window: window["latest dev_accuracy"] + window["latest val_accuracy"] >= 0,
        "dev accuracy {latest dev_accuracy:.0%}, which selects the model; val accuracy {latest val_accuracy:.0%},"
        " which is reported",
        "docs/evaluation.md",
    ),
)


def judge(name: str, line: Line) -> dict[str, str]:
    """The sentence of one rule by its name, if it holds for the metrics of a single line."""
    return {rule.name: text for rule, text in _apply([one for one in RULES if one.name == name], [line], 1).values()}


def _apply(rules: Sequence[Rule], history: Sequence[Line], size: int) -> dict[str, tuple[Rule, str]]:
    """The rules that hold, by name, with their sentences."""
    window, holding = Window(history[-size:], history[:size]), dict[str, tuple[Rule, str]]()
    for rule in rules:
        if holding.keys().isdisjoint(rule.unless) and rule.holds(window):
            holding[rule.name] = (rule, rule.sentence.format_map(window))
    return holding


def collapses(history: Sequence[Line]) -> dict[str, str]:
    """Failures for good in the metrics of all steps so far, by name, each with a sentence of advice."""
    return {name: text for name, (rule, text) in _due(history).items() if rule.collapse}


def warnings(history: Sequence[Line]) -> dict[str, str]:
    """Warnings about the metrics of all steps so far, by name, with symptom and advice; `right` is good news."""
    return {name: text for name, (rule, text) in _due(history).items() if not rule.collapse}


def _due(history: Sequence[Line]) -> dict[str, tuple[Rule, str]]:
    """The rules that hold; before a whole window only those that need none."""
    return _apply([rule for rule in RULES if rule.from_first_step or len(history) >= WINDOW], history, WINDOW)


def diagnose(
    history: Sequence[Line],
    loss: Loss,
    *,
    groups: Sequence[Mapping[str, Any]] = (),
    max_new_tokens: int = 1,
    exact: bool = False,
) -> list[dict[str, str]]:
    """What the metrics of a run say: findings with `name`, `text` and `page`; what is wrong comes first.

    `groups`: all of the last step, if the loss had one inner update. `exact`: sampler and trainer compute in float32.
    Short runs are judged by their halves.
    """
    holding = _apply((*RULES, *FACTS), history, min(WINDOW, (len(history) + 1) // 2))
    findings = [{"name": name, "text": text, "page": rule.page} for name, (rule, text) in holding.items()]
    signs = [sign] if (sign := flipped(history[-1], groups, loss, max_new_tokens=max_new_tokens)) else []
    gap = Window(history[-WINDOW:], history[:WINDOW])["median sampler_gap"]
    if exact and gap > SAMPLER_GAP:
        signs.append(
            f"the update's log-probs differ from the sampler's by {gap:.2g} nats per token, in float32 where rounding"
            " makes 1e-6: it computes another distribution, such as one without the temperature"
        )
    if loss.beta and loss.kl_estimator == "original":
        signs.append(
            "`original` flips the sign of the log-ratio and does not estimate this KL: train with `--kl-estimator k3`"
        )
    return [{"name": "sign", "text": text, "page": "docs/one-step.md"} for text in signs] + findings


def flipped(line: Line, groups: Sequence[Mapping[str, Any]], loss: Loss, *, max_new_tokens: int) -> str | None:
    """A term of a step's loss whose sign is flipped, by its groups and metrics; None if all are right, or unknown.

    At ratio 1 the policy loss is the sum of -weight * advantage over tokens, and the rest is beta * KL, never negative.
    """
    plain = loss.kl_in == "loss" and loss.kl_estimator in ("k2", "k3", "original")
    if plain and line.get("kl", 0.0) < 0:
        return f"the KL is {line['kl']:.2g} nats per token, which no estimator can be: its sign is flipped"
    rows = [row for group in groups for row in group["completions"]]
    weighted = loss.mask_truncated or loss.entropy_share < 1 or loss.entropy_bonus or loss.pass_at_k > 1
    weighted = weighted or loss.loss_type not in LINEAR or loss.sampler_correction not in ("none", "auto")
    weighted = weighted or line.get("sampler_gap", 0.0) > SAMPLER_GAP or line.get("group_advantage", 0.0) > EXACT
    if not plain or weighted or not rows or "loss" not in line:
        return None
    rewards = [sum(float(row["advantage"]) * float(row["reward"]) for row in group["completions"]) for group in groups]
    if min(rewards) < 0:
        return "advantages fall where rewards rise: their sign is flipped, and worse completions become more likely"
    total = sum(float(row["advantage"]) * row["length"] for row in rows)
    tokens = {"dapo": sum(row["length"] for row in rows), "dr_grpo": len(rows) * max_new_tokens}
    policy = -total / tokens[loss.loss_type] if loss.loss_type in tokens else 0.0
    kl, noise = loss.beta * line.get("kl", 0.0), 1e-6 + 1e-3 * abs(policy)
    if abs(policy) > noise + 2 * kl and abs(line["loss"] + policy) < abs(line["loss"] - policy):
        values = f"the loss is {line['loss']:.2g}, and by the kept groups the policy loss is {policy:.2g}"
        return f"{values}: its sign is flipped, and worse completions become more likely"
    if line["loss"] - policy < -noise and kl > noise:
        values = f"the loss is {line['loss']:.2g}, less than the policy loss of the kept groups, {policy:.2g}"
        return f"{values}: the KL term is subtracted, which rewards distance from the reference"
    return None
