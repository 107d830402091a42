"""An HTML report of one run or several: self-contained, works offline.

`account` provides the data, `report.html.j2` and `report.css` the page. All external text is passed through
`printable` and escaped, and the page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from markupsafe import Markup

from grpo_cli.core.config.settings import FIELDS
from grpo_cli.core.evals.statistics import NOT_SIGNIFICANT, holm, significant
from grpo_cli.core.metrics import METRICS, Metric
from grpo_cli.core.rl.health import collapses, warnings
from grpo_cli.core.run.logs import Evaluated, Example
from grpo_cli.ui import figures as plot
from grpo_cli.ui.account import Account, Change, change, verdict
from grpo_cli.ui.figures import Series
from grpo_cli.ui.pages import render
from grpo_cli.ui.text import interval, percent, probability

SMALLER = 0.8  # scale of images, to match the page's text size
TITLED = 3  # most runs named in the title
Side = tuple[int, Example]  # a completion, and its step


def page(accounts: Sequence[Account], *, defaults: Mapping[str, object], window: int = 1) -> str:
    """The whole page. `defaults` are the shipped settings by key; curves are averaged over `window` steps."""
    places = [
        (f"{account.name}, {since}" if len(accounts) > 1 else since, facts)
        for account in accounts
        for since, facts in account.environment.items()
        if isinstance(facts, Mapping)
    ]
    views = (story, verdict, about, compared, pairs_by_cell, recorded, ordered_reasons)
    return render(
        "report.html.j2",
        **{view.__name__: view for view in (*views, health_rows, signs, sparkline, shown, interval, probability)},
        accounts=accounts,
        title=", ".join(one.name for one in accounts) if len(accounts) <= TITLED else f"{len(accounts)} runs",
        figures=_figures(accounts, window),
        changed_settings=[key for key in defaults if any(one.settings.get(key) != defaults[key] for one in accounts)],
        defaults=defaults,
        fields=FIELDS,
        places=places,
        facts=dict.fromkeys(name for _, facts in places for name in facts),
    )


def story(account: Account) -> str:
    """Model, settings and duration of the training."""
    values = account.settings
    seconds = sum(line.get("time/total", 0) + line.get("time/eval", 0) for line in account.metrics)
    taken, planned = account.steps, values["train.num_iterations"]
    steps = f"{taken:,} steps" if taken == planned else f"{taken:,} of {planned} steps"
    style, numbers = (
        values[f"task.{key}"] if values[f"train.prompt_{key}"] == "task" else values[f"train.prompt_{key}"]
        for key in ("style", "numbers")
    )
    return (
        f"{shown(values['model.model'])}, trained on {shown(style)} puzzles of {shown(numbers)} numbers: "
        f"{steps}, each of {values['train.batch_size']} prompts with {values['train.num_generations']} completions, "
        f"in {_duration(seconds)}."
    )


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s" if minutes else f"{left} s"


def _figures(accounts: Sequence[Account], window: int) -> dict[str, Markup]:
    """SVG by caption."""
    curves = [
        plot.from_metrics(one.name, one.metrics, temperature=cast(float, one.settings["train.temperature"]))
        for one in accounts
    ]
    drawn = {
        "Accuracy and reward; stars mark the saved model": plot.training_figure(curves, window),
        "KL from the reference model": plot.kl_figure(curves, window),
    }
    for figure in drawn.values():
        figure.set_size_inches(*(SMALLER * figure.get_size_inches()))
    return {
        caption: Markup(plot.svg(figure, prefix=f"figure{number}"))
        for number, (caption, figure) in enumerate(drawn.items(), start=1)
    }


def about(account: Account, steps: Mapping[int, Evaluated]) -> str:
    """Number of puzzles of a cell, and where it peaked if not at the best step."""
    peak = max(steps.values(), key=lambda one: one.accuracy)
    best = steps.get(account.best)
    beaten = best is not None and peak.accuracy > best.accuracy
    return f"{peak.count:,} puzzles" + f", peak {percent(peak.accuracy)} at step {peak.step:,}" * beaten


@dataclass(frozen=True)
class Comparison:
    """The best models of two runs on one cell."""

    before: Evaluated
    after: Evaluated
    change: Change
    p_value: float
    verdict: str


def compared(first: Account, second: Account) -> list[Comparison]:
    """The best models of two runs on each cell that both evaluated on the same puzzles."""
    tests = []
    for cell in (name for name in first.evaluations if name in second.evaluations):
        one, other = first.evaluations[cell].get(first.best or -1), second.evaluations[cell].get(second.best or -1)
        if one and other and (tested := change(one, other)):
            tests.append((one, other, tested))
    rows = []
    for (one, other, tested), p_value in zip(tests, holm([test[-1].p_value for test in tests]), strict=True):
        better = second.name if tested.gained > tested.lost else first.name
        winner = f"{better} is better" if significant(p_value) else NOT_SIGNIFICANT
        rows.append(Comparison(one, other, tested, p_value, winner))
    return rows


def pairs_by_cell(account: Account) -> dict[str, list[tuple[Side, Side]]]:
    """Each cell's puzzles that changed from the start to the best step; if none did, those never solved."""
    found = {}
    for cell, steps in account.evaluations.items():
        one, other = steps.get(0), steps.get(account.best)
        if one and other and one.puzzles == other.puzzles:
            sides = [((0, a), (other.step, b)) for a, b in zip(one.examples, other.examples, strict=True)]
            solved = [[example.reason == "correct" for _, example in pair] for pair in sides]
            changed = [pair for pair, (before, after) in zip(sides, solved, strict=True) if before != after]
            found[cell] = changed or [pair for pair, known in zip(sides, solved, strict=True) if not any(known)]
    return {cell: pairs for cell, pairs in found.items() if pairs}


def recorded(account: Account, steps: Mapping[int, Evaluated]) -> list[tuple[str, Evaluated]]:
    """The evaluations of a cell whose reasons are known."""
    return [(word, steps[step]) for word, step in account.milestones if step in steps and steps[step].reasons]


def ordered_reasons(evaluations: Sequence[tuple[str, Evaluated]]) -> list[str]:
    """Reasons of scores: correct ones first, then by frequency at the start."""
    totals = {reason: one.reasons[reason] for _, one in reversed(evaluations) for reason in one.reasons}
    return sorted(totals, key=lambda reason: (reason != "correct", -totals[reason], reason))


def health_rows(account: Account) -> list[tuple[Metric, Series]]:
    """Metrics and their points after the start."""
    history = [line for line in account.metrics if line["step"] > 0]
    rows = [
        (one, [(int(line["step"]), line[one.name]) for line in history if one.name in line])
        for one in METRICS
        if one.in_report
    ]
    return [(one, points) for one, points in rows if points]


def signs(account: Account) -> list[str]:
    """Warnings about the last steps."""
    history = [line for line in account.metrics if line["step"] > 0]
    return list((collapses(history) | warnings(history)).values())


def sparkline(points: Series) -> str:
    """The points of a line from lowest to highest, 100 by 20."""
    low, high = min(value for _, value in points), max(value for _, value in points)
    start, end = points[0][0], points[-1][0]
    return " ".join(
        f"{100 * (step - start) / max(end - start, 1):.1f},{19 - 18 * (value - low) / ((high - low) or 1):.1f}"
        for step, value in points
    )


def shown(value: object) -> str:
    """A setting or a fact as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
