"""Signs in the metrics that a training has gone wrong for good. Knows numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

WINDOW = 20  # steps that are judged together
KL_LIMIT = 1.0  # nats a token; trainings that learn stay far below
TRUNCATED_LIMIT = 0.9  # share of completions


def collapses(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What has gone wrong by the metrics of all steps so far: a word for it -> a sentence that says what to do.

    kl: the policy has run away from the reference. length: nearly every completion runs out of tokens, which they did
    not at first. format: every completion is well formed and none is right.
    """
    late = history[-WINDOW:]
    if len(late) < WINDOW:
        return {}
    found: dict[str, str] = {}
    kl = median(_values(late, "kl") or [0.0])
    if kl > KL_LIMIT:
        found["kl"] = (
            f"the policy has run away from the reference (KL {kl:.2g} a token): lower `--learning-rate`,"
            " or raise `--beta`"
        )
    truncated, before = (fmean(_values(steps, "truncated") or [0.0]) for steps in (late, history[:WINDOW]))
    if truncated > TRUNCATED_LIMIT and before < TRUNCATED_LIMIT / 2:
        found["length"] = (
            f"completions have grown until {truncated:.0%} of them run out of tokens: lower `--learning-rate`,"
            " or raise `--max-new-tokens`"
        )
    well_formed, right = (_values(late, key) for key in ("format_rate", "accuracy"))
    if well_formed and right and fmean(well_formed) > 0.99 and max(right) == 0:
        found["format"] = (
            f"in {WINDOW} steps every completion was well formed and none was right: the format is all that is"
            " rewarded, so start from a model that solves some puzzles, or with fewer `--numbers`"
        )
    return found


def _values(steps: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [step[key] for step in steps if key in step]
