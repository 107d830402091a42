"""Rules about metrics: whether a training has collapsed or is unhealthy, how it learns, and the page on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

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
MOVED_LIMIT = 0.1  # share of weights; float32 changes nearly all, bf16 a few percent if steps are small
NOTATION_LIMIT = 0.1  # share of completions that are correct except for their notation
FORMAT_GAIN = 0.2  # rise of the format rate that, with a tenth of it in accuracy, is only the format
CHEAT_LIMIT = 0.1  # share of completions, and twice as many as in the first window


PAGES = {  # finding -> the page that explains it
    "gradient": "docs/how-it-works.md",
    "progress": "docs/study.md",
    "loss": "docs/why.md",
    "limit": "docs/training.md",
    "spread": "docs/why.md",
    "search": "docs/why.md",
    "selection": "docs/evaluation.md",
    "estimator": "docs/how-it-works.md",
    "moved": "docs/gpus.md",
    "gap": "docs/models.md",
    "format": "docs/pretrained.md",
}
PAGE = "docs/training.md"  # of all other findings


def diagnose(history: Sequence[Mapping[str, float]], loss: Loss) -> list[dict[str, str]]:
    """What the metrics of all steps say, good and bad: findings with `name`, `text` and `page`; failures first."""
    late, early = history[-WINDOW:], history[:WINDOW]
    steps = "1 step" if len(late) == 1 else f"{len(late)} steps"
    found = {**collapses(history), **warnings(history)}
    mixed = 1 - _mean(late, "zero_variance")
    found["gradient"] = f"{mixed:.0%} of the groups of the last {steps} had unequal rewards, and so a gradient"
    found["progress"] = _progress(early, late)
    found["loss"] = (
        f"{_mean(late, 'loss'):.2g}, which does not measure progress: at ratio 1 it is 0, or says only whether better"
        f" completions are longer; the gradient's norm is {_mean(late, 'grad_norm'):.2g}"
    )
    length, cut = _mean(late, "completion_length"), _mean(late, "truncated")
    found["limit"] = f"completions have {length:.0f} tokens on average; {cut:.0%} reach the limit"
    found["spread"] = (
        f"the entropy is {_mean(late, 'entropy'):.2g} nats per token, {_mean(early, 'entropy'):.2g} at first"
    )
    if values := _values(late, "kl"):
        found["spread"] += f"; the KL from the reference is {fmean(values):.2g}"
    if _values(late, "behaviour/tries"):
        found["search"] = _search(early, late)
    evaluated = [line for line in history if "val_accuracy" in line and "dev_accuracy" in line]
    if evaluated:
        dev, val = evaluated[-1]["dev_accuracy"], evaluated[-1]["val_accuracy"]
        found["selection"] = (
            f"dev accuracy {dev:.0%}, which selects the model; val accuracy {val:.0%}, which is reported"
        )
    if loss.beta and loss.kl_estimator == "original":
        found["estimator"] = (
            "`original` flips the sign of the log-ratio and does not estimate this KL: train with `--kl-estimator k3`"
        )
    return [{"name": name, "text": text, "page": PAGES.get(name, PAGE)} for name, text in found.items()]


def _progress(early: Sequence[Mapping[str, float]], late: Sequence[Mapping[str, float]]) -> str:
    """How reward, accuracy and format changed from the first window to the last."""
    names = {"reward": "reward", "accuracy": "accuracy", "format_rate": "format"}
    pairs = {name: (_mean(early, name), _mean(late, name)) for name in names}
    text = ", ".join(f"{names[name]} {before:.2f} -> {after:.2f}" for name, (before, after) in pairs.items())
    accuracy, well_formed = (after - before for before, after in (pairs["accuracy"], pairs["format_rate"]))
    if well_formed > FORMAT_GAIN and accuracy < FORMAT_GAIN / 10:
        text += ": the format was learned and the task was not; start from a model that solves some puzzles"
    return text


def _search(early: Sequence[Mapping[str, float]], late: Sequence[Mapping[str, float]]) -> str:
    """How the search changed from the first window to the last."""
    shares = {"gave_up": "gave up", "slips": "tries with a slip", "repeated": "repeated tries", "parsed": "lines read"}
    tries, *others = [
        (_mean(early, f"behaviour/{name}"), _mean(late, f"behaviour/{name}")) for name in ("tries", *shares)
    ]
    parts = [
        f"{word} {before:.0%} -> {after:.0%}" for word, (before, after) in zip(shares.values(), others, strict=True)
    ]
    return ", ".join([f"{tries[0]:.1f} -> {tries[1]:.1f} tries a completion", *parts])


def collapses(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Failures in the metrics of all steps so far, by name, each with a sentence of advice.

    kl: the policy is far from the reference. length: nearly every completion reaches the token limit, unlike at first.
    format: every completion is well formed and none is correct.
    """
    late = history[-WINDOW:]
    if len(late) < WINDOW:
        return {}
    failures: dict[str, str] = {}
    kl = median(_values(late, "kl") or [0.0])
    if kl > KL_LIMIT:
        failures["kl"] = (
            f"the KL from the reference has exploded ({kl:.2g} per token): lower `--learning-rate`, or raise `--beta`"
        )
    truncated, before = (fmean(_values(steps, "truncated") or [0.0]) for steps in (late, history[:WINDOW]))
    if truncated > TRUNCATED_LIMIT and before < TRUNCATED_LIMIT / 2:
        failures["length"] = (
            f"completions have grown: {truncated:.0%} of them reach the token limit: lower `--learning-rate`,"
            " or raise `--max-new-tokens`"
        )
    well_formed, right = (_values(late, key) for key in ("format_rate", "accuracy"))
    if well_formed and right and fmean(well_formed) > 0.99 and max(right) == 0:
        failures["format"] = (
            f"in {WINDOW} steps every completion was well formed and none was correct, so only the format is learned:"
            " start from a model that solves some puzzles, or use fewer `--numbers`"
        )
    return failures


def warnings(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Warnings about the metrics of all steps so far, by name, each with the symptom and advice.

    gap: sampling or training disagrees with the model's own forward. right (good news), wrong, settled: nearly all
    groups have equal rewards. truncated: many completions reach the token limit. entropy: completions hardly differ.
    moved: weight updates are rounded away. notation: correct answers in a wrong notation. cheat/...: a kind of cheating
    spreads. failed: a reward function or scorer raised an exception, in any step.
    """
    late, early = history[-WINDOW:], history[:WINDOW]
    messages = {}
    if failed := _mean(late, "reward/failed"):
        messages["failed"] = (
            f"scoring failed for {failed:.1%} of the completions, which got reward 0:"
            " see the exception with `--reward-errors stop`"
        )
    if len(late) < WINDOW:
        return messages
    gone = collapses(history)
    messages |= {} if "format" in gone else _equal_rewards(late)
    gap = median(_values(late, "logprob_gap") or [0.0])
    if gap > GAP_LIMIT:
        messages["gap"] = (
            f"sampling or training differs from the model's own forward by {gap:.2g} nats per token;"
            " rounding explains 0.07, so training does not optimize this model: try `--precision float32`"
        )
    truncated = _mean(late, "truncated")
    if truncated > CUT_LIMIT and "length" not in gone:
        messages["truncated"] = (
            f"{truncated:.0%} of the completions reach the token limit, so they cannot be correct:"
            " raise `--max-new-tokens`"
        )
    entropy, before, accuracy = _mean(late, "entropy"), _mean(early, "entropy"), _mean(late, "accuracy")
    known = bool(_values(late, "entropy"))
    if known and entropy < min(ENTROPY_LIMIT, ENTROPY_LEFT * before) and accuracy < LEARNED:
        messages["entropy"] = (
            f"the entropy fell from {before:.2g} to {entropy:.2g} nats per token at an accuracy of {accuracy:.0%}:"
            " completions hardly differ any more; lower `--learning-rate`, or raise `--temperature` or `--beta`"
        )
    moved = _values([step for step in late if step.get("zero_variance", 0) < 1], "weights_changed")
    if len(moved) >= WINDOW / 2 and median(moved) < MOVED_LIMIT:
        messages["moved"] = (
            f"a step changes {median(moved):.1%} of the weights; smaller updates are rounded away: train with"
            " `--precision bf16-master`, or raise `--learning-rate`"
        )
    notation = _mean(late, "lenient_accuracy") - accuracy
    if notation > NOTATION_LIMIT:
        messages["notation"] = (
            f"{notation:.0%} of the completions are correct except for notation, such as `×` or a trailing `= 13`,"
            " and earn nothing: show the notation with `--style one-shot`"
        )
    return {**messages, **_spreading_cheats(late, early)}


def _equal_rewards(late: Sequence[Mapping[str, float]]) -> dict[str, str]:
    equal, accuracy = _mean(late, "zero_variance"), _mean(late, "accuracy")
    if equal <= EQUAL_LIMIT:
        return {}
    groups = f"{equal:.0%} of the groups have equal rewards"
    if accuracy >= LEARNED:
        good = f"{accuracy:.0%} of the completions are correct: nothing is left to learn from these puzzles"
        return {"right": f"{good}; stop, or use harder ones with `--numbers`"}
    if accuracy <= 1 - LEARNED:
        advice = "start from a model that solves some puzzles, or use fewer `--numbers`"
        return {"wrong": f"{groups} and {accuracy:.0%} of the completions are correct, so little is learned: {advice}"}
    advice = "raise `--num-generations` or `--temperature`"
    return {"settled": f"{groups}: each puzzle is always solved or never, so little is learned; {advice}"}


def _spreading_cheats(late: Sequence[Mapping[str, float]], early: Sequence[Mapping[str, float]]) -> dict[str, str]:
    shares = {kind: (_mean(late, f"cheat/{kind}"), _mean(early, f"cheat/{kind}")) for kind in CHEATS}
    return {
        f"cheat/{kind}": f"{share:.0%} of the completions {CHEATS[kind]}, {before:.0%} at first: see"
        " `samples.jsonl`; to stay closer to the starting model, raise `--beta` or lower `--learning-rate`"
        for kind, (share, before) in shares.items()
        if share > CHEAT_LIMIT and share > 2 * before
    }


def _mean(steps: Sequence[Mapping[str, float]], key: str) -> float:
    return fmean(_values(steps, key) or [0.0])


def _values(steps: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [step[key] for step in steps if key in step]
