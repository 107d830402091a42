"""What a study found, as a table in the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.text import Text

from grpo_cli.core.files import write
from grpo_cli.ui.figures import COLOURS, as_label, panels, svg
from grpo_cli.ui.pages import render
from grpo_cli.ui.tables import grid
from grpo_cli.ui.text import accuracy, counted, out, p_value, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("condition", "accuracy", "less the first, points", "Holm p", "verdict")


def table(result: Mapping[str, Any]) -> None:
    """One line per condition, and how to read them."""
    out.print(grid(*COLUMNS, numeric=COLUMNS[1:4], rows=rows(result)))
    for sentence in notes(result):
        out.print(Text(printable(sentence)))


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table, as text."""
    shown = []
    for place, row in enumerate(result["conditions"]):
        low, high = row["difference_interval"]
        difference = [
            f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            p_value(row["p_value"]),
            row["verdict"],
        ]
        mean = accuracy(row["accuracy"], row["interval"])
        shown.append([row["condition"], mean, *(difference if place else ["", "", "the baseline"])])
    return shown


def notes(result: Mapping[str, Any]) -> list[str]:
    """How to read the table."""
    seeds, others = len(result["seeds"]), len(result["conditions"]) - 1
    return [
        f"accuracy on {result['count']:,} puzzles ({result['cell']}) after step {result['step']}, mean of {seeds} seeds"
        ", with a bootstrap interval over seeds",
        "differences are paired by seed and by puzzle; p-values are the larger of two t-tests, over seeds and over "
        f"puzzles, corrected for {counted(others, 'comparison')} (Holm)",
    ]


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the table, the curves and every condition's settings as one HTML page."""
    usual, *_ = result["settings"].values()
    own = {
        name: {key: value for key, value in settings.items() if key not in usual or usual[key] != value}
        for name, settings in result["settings"].items()
    }
    own[next(iter(own))] = usual
    html = render(
        "study.html.j2",
        result=result,
        columns=COLUMNS,
        rows=rows(result),
        notes=notes(result),
        settings=own,
        curves=Markup(svg(_figure(result), prefix="curves")),
    )
    write(path, html.encode("utf-8"))


def _figure(result: Mapping[str, Any]) -> Figure:
    """Val accuracy by step: each seed faintly, the mean over seeds in front."""
    figure, (axes,) = panels("", height=4.5)
    for place, (name, seeds) in enumerate(result["curves"].items()):
        colour, style = COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
        for points in seeds:
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.25, linewidth=1, linestyle=style)
        shared = [dict(points) for points in seeds]
        steps = sorted(set.intersection(*map(set, shared)))
        means = [fmean(points[step] for points in shared) for step in steps]
        axes.plot(steps, means, color=colour, linestyle=style, marker=".", label=as_label(name))
    axes.set(ylabel="val accuracy (greedy)", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
