"""Figures from metrics: the training curve and the KL curve of one run or several. Imports matplotlib only to draw."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import write
from grpo_cli.core.metrics import SUITE, best_step, metric
from grpo_cli.core.task.suite import CELLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = list[tuple[int, float]]
Dashes = tuple[int, tuple[float, ...]]  # offset, then lengths of dashes and gaps: a line style of matplotlib

# Okabe and Ito's colours, distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
MOST_MARKERS = 30
STYLE_COLOURS = {"one-shot": COLOURS[0], "zero-shot": COLOURS[1], "natural": COLOURS[2]}
NAME_CHARACTERS = 48
LEGEND_CHARACTERS = 100
FORMATS = ("png", "svg")
SVG_METADATA = ("Creator", "Date", "Format", "Type")
LARGEST = 1e100  # largest value to draw: sums and axes of larger ones overflow


@dataclass(frozen=True)
class Curves:
    """The curves of one run, each as (step, value) points in the order of steps.

    `cells` has a series for every other evaluated cell of the suite, such as `val 4 zero-shot`.
    """

    name: str
    reward: Series
    accuracy: Series
    kl: Series
    val: Series
    cells: dict[str, Series] = field(default_factory=dict)
    best: int | None = None  # step of the best model, which the run saves
    temperature: float | None = None  # of sampling, if known

    @property
    def is_empty(self) -> bool:
        return not any((self.reward, self.accuracy, self.kl, self.val))


def from_metrics(name: str, lines: Iterable[Mapping[str, float]], *, temperature: float | None = None) -> Curves:
    """The curves in a run's metrics. A missing value, or one too large to draw, adds no point."""
    rows = list(lines)

    def series(key: str) -> Series:
        return [(int(row["step"]), row[key]) for row in rows if abs(row.get(key, math.inf)) <= LARGEST]

    cells = {cell: points for cell in CELLS if (points := series(SUITE + cell))}
    reward, accuracy, kl, val = (series(key) for key in ("reward", "accuracy", "kl", "val_accuracy"))
    return Curves(name, reward, accuracy, kl, val, cells, best_step(rows) or None, temperature)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and as many before as after it, at most `window` in all, fewer near the ends.

    Centred, so it does not trail the curve: a straight line stays as it is.
    """
    last, half = len(values) - 1, (window - 1) // 2
    radii = [min(half, place, last - place) for place in range(len(values))]
    return [fmean(values[place - radius : place + radius + 1]) for place, radius in enumerate(radii)]


def svg(figure: Figure, *, prefix: str) -> str:
    """The figure as an SVG element with real text, for embedding; `prefix` makes its ids unique."""
    import matplotlib

    drawn = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "countdown", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=dict.fromkeys(SVG_METADATA))
    element = drawn.getvalue().partition("<svg")[2]
    return "<svg" + re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", element)


def training_figure(curves: Sequence[Curves], window: int = 1) -> Figure:
    """Train and val accuracy, the suite's cells if there are any, and the reward below, by step.

    Curves of training are averaged over `window` steps. Stars mark the best model, which the run saved.
    """
    suites = any(run.cells for run in curves)
    figure, axes = panels(_title(curves), height=9.0 if suites else 6.0, ratios=(2, 2, 1) if suites else (2, 1))
    upper, lower = axes[0], axes[-1]
    for index, run in enumerate(curves):
        dots, place = divmod(index, len(COLOURS))
        colour = COLOURS[place]
        sampled = "train (sampled)" if run.temperature is None else f"train (sampled, T {run.temperature:g})"
        averaged = f"{sampled[:-1]}, centred mean of {window - 1 + window % 2:,})" if window > 1 else sampled
        _line(upper, run.accuracy, colour, dots, _label(averaged, run, curves), window)
        val_colour = colour if len(curves) > 1 else COLOURS[1]
        _markers(upper, run.val, val_colour, MARKERS[0], _dashes(4, 2, dots), _label("val (greedy)", run, curves), run)
        for name, points in run.cells.items():
            split, numbers, style = name.split(" ", 2)
            cell_colour = STYLE_COLOURS[style] if len(curves) == 1 else colour
            dashes = _dashes(4, 2, dots) if split == "val" else _dashes(1, 4, dots)
            _markers(axes[1], points, cell_colour, MARKERS[int(numbers) - 3], dashes, _label(name, run, curves), run)
        _line(lower, run.reward, colour, dots, "", window)
    for panel in axes[:-1]:
        panel.set(ylabel=metric("accuracy").axis, ylim=(0, 1.02))
        panel.yaxis.set_major_formatter("{x:.0%}")
    lower.set_ylabel(metric("reward").axis)
    lower.set_ylim(bottom=0)
    if any(run.best for run in curves):
        upper.scatter([], [], s=100, color="#555555", marker="*", label="best model, saved")
    _legend(figure, *axes[:-1])
    return figure


def kl_figure(curves: Sequence[Curves], window: int = 1) -> Figure:
    """The KL estimate by step."""
    figure, (axes,) = panels(_title(curves), height=3.6)
    for index, run in enumerate(curves):
        dots, place = divmod(index, len(COLOURS))
        _line(axes, run.kl, COLOURS[place], dots, _label("KL", run, curves), window)
    axes.set_ylabel(metric("kl").axis)
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        _legend(figure, axes)
    return figure


def panels(title: str, *, height: float, ratios: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """A figure of panels above one another, which share the axis of steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, height), layout="constrained")
    shown: list[Axes] = list(figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
    for axes in shown:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
    shown[0].set_title(title, loc="left", weight="bold")
    shown[-1].set_xlabel("step")
    shown[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, shown


def _title(curves: Sequence[Curves]) -> str:
    return as_label(curves[0].name) if len(curves) == 1 else f"{len(curves)} runs"


def _dashes(dash: float, gap: float, dots: int) -> Dashes:
    """A line style of one dash and `dots` dots, to distinguish runs of the same colour."""
    return (0, (dash, gap, *(1, 2) * dots))


def _line(axes: Axes, points: Series, colour: str, dots: int, label: str, window: int) -> None:
    """Draw a curve, solid or with `dots`; if averaged over `window`, in front of the raw curve."""
    if not points:
        return
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "." if len(points) == 1 else ""
    if window > 1:
        axes.plot(steps, values, color=colour, marker=marker, alpha=0.25, linewidth=1)
        values = moving_average(values, window)
    axes.plot(steps, values, color=colour, marker=marker, linestyle=_dashes(10, 2, dots) if dots else "-", label=label)


def _markers(axes: Axes, points: Series, colour: str, marker: str, dashes: Dashes, label: str, run: Curves) -> None:
    """Draw a curve with markers, on some of its points if there are many. A star marks the run's best step."""
    if not points:
        return
    values = dict(points)
    (line,) = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=dashes, label=label)
    line.set(markevery=math.ceil(len(points) / MOST_MARKERS), clip_on=False, zorder=3, markersize=4, linewidth=1)
    if run.best is not None and run.best in values:
        star = axes.scatter(run.best, values[run.best], s=140, color=colour, marker="*", edgecolors="white")
        star.set(clip_on=False, zorder=4)


def _label(curve: str, run: Curves, curves: Sequence[Curves]) -> str:
    return f"{curve} ({as_label(run.name)})" if len(curves) > 1 else curve


def as_label(text: str) -> str:
    """A name as a label: shortened, with matplotlib's math characters escaped."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return (shown if len(shown) <= NAME_CHARACTERS else shown[: NAME_CHARACTERS - 1] + "…").replace("$", r"\$")


def _legend(figure: Figure, *panels: Axes) -> None:
    handles, labels = [], []
    for axes in panels:
        more = axes.get_legend_handles_labels()
        handles += more[0]
        labels += more[1]
    columns = max(1, LEGEND_CHARACTERS // (8 + max(map(len, labels), default=0)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the extension of `path`."""
    import matplotlib

    kind = require_drawable(path)
    drawn = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "countdown"}):
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write(path, drawn.getvalue())


def require_drawable(path: Path) -> str:
    """The format of a figure; raises CountdownError for one that cannot be drawn."""
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise CountdownError(f"cannot draw `{path}`: not a PNG or SVG file", "end its name in `.png` or `.svg`")
    return kind
