"""Figures from metrics: read a run's metrics or the original system's file, draw the training curve and the KL curve.

Imports matplotlib only when drawing.
"""

from __future__ import annotations

import json
import math
import os
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

# The original system logged steps 0, 10, 20, ...: means over the steps since the previous line.
ORIGINAL_EVERY = 10
ORIGINAL_KEYS = ("rewards_avg", "train_accuracies_avg", "val_accuracies_avg", "kl_avg")

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
LARGEST_STEP = 10**15


@dataclass(frozen=True)
class Curves:
    """The curves of one run, each as (step, value) points in the order of steps.

    `val` has one series per evaluated set: `val`, or `val` with the original's name of the set; `cells` has one per
    other evaluated cell of the suite, such as `val 4 zero-shot`.
    """

    name: str
    reward: Series
    accuracy: Series
    kl: Series
    val: dict[str, Series]
    cells: dict[str, Series] = field(default_factory=dict)
    best: int | None = None  # step of the best model, which the run saves
    temperature: float | None = None  # of sampling, if known

    @property
    def is_empty(self) -> bool:
        return not any((self.reward, self.accuracy, self.kl, *self.val.values()))


# Reading


def load(path: Path) -> Curves:
    """The curves in a file: lines of metrics, or the original system's JSON object. Their name is the file's stem.

    Raises CountdownError, naming the file and the line or key, for anything else.
    """
    if path.exists() and not path.is_file():
        raise CountdownError(f"`{path}` is not a regular file", "name a run, or a file of metrics")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise CountdownError(f"cannot read `{path}`: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise CountdownError(f"`{path}` is not UTF-8 text") from None
    whole = _json(text)
    if isinstance(whole, dict) and any(key in whole for key in ORIGINAL_KEYS):
        curves = _from_original(path, whole)
    else:
        curves = from_metrics(path.stem, _metrics(path, text))
    if curves.is_empty:
        raise CountdownError(f"`{path}` holds no metrics to plot")
    return curves


def from_metrics(name: str, lines: Iterable[Mapping[str, float]], *, temperature: float | None = None) -> Curves:
    """The curves in a run's metrics. A missing value, or one that cannot be drawn, adds no point."""
    rows = list(lines)

    def series(key: str) -> Series:
        return [(int(row["step"]), row[key]) for row in rows if key in row and _can_be_drawn(row[key])]

    cells = {cell: points for cell in CELLS if (points := series(SUITE + cell))}
    val = {"val": series("val_accuracy")}
    best = best_step(rows) or None
    return Curves(name, series("reward"), series("accuracy"), series("kl"), val, cells, best, temperature)


def _metrics(path: Path, text: str) -> Iterable[dict[str, float]]:
    for number, line in enumerate(text.splitlines(), start=1):
        row = _json(line)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise CountdownError(
                f"`{path}`, line {number}: not a line of metrics",
                "a file to plot is a run's metrics or the original system's JSON object",
            )
        if abs(row["step"]) > LARGEST_STEP:
            raise CountdownError(f"`{path}`, line {number}: `step` is too large")
        yield {key: _number(f"`{path}`, line {number}: `{key}`", value) for key, value in row.items()}


def _from_original(path: Path, lists: Mapping[str, object]) -> Curves:
    def series(name: str, values: object) -> Series:
        if not isinstance(values, list):
            raise CountdownError(f"`{path}`: `{name}` is not a list")
        numbers = [_number(f"`{path}`: `{name}[{index}]`", value) for index, value in enumerate(values)]
        return [(ORIGINAL_EVERY * index, number) for index, number in enumerate(numbers) if _can_be_drawn(number)]

    reward, accuracy, val, kl = (lists.get(key, []) for key in ORIGINAL_KEYS)
    named = {f"val {name}": values for name, values in val.items()} if isinstance(val, dict) else {"val": val}
    return Curves(
        path.stem,
        series("rewards_avg", reward),
        series("train_accuracies_avg", accuracy),
        series("kl_avg", kl),
        {name: series("val_accuracies_avg", values) for name, values in named.items()},
    )


def _can_be_drawn(value: float) -> bool:
    return abs(value) <= LARGEST  # also false for NaN


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CountdownError(f"{where} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise CountdownError(f"{where} is too large") from None


# Drawing


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and as many before as after it, at most `window` in all, fewer near the ends.

    Centred, so it does not trail the curve: a straight line stays as it is.
    """
    last, half = len(values) - 1, (window - 1) // 2
    radii = [min(half, place, last - place) for place in range(len(values))]
    return [fmean(values[place - radius : place + radius + 1]) for place, radius in enumerate(radii)]


def training_curve(curves: Sequence[Curves], path: Path, *, smooth: bool = False, window: int = 10) -> None:
    """Write train and val accuracy, the suite's cells if there are any, and the reward below, by step.

    Stars mark the best model, which the run saved. PNG or SVG by the extension of `path`.
    """
    save(training_figure(curves, smooth=smooth, window=window), path)


def kl_curve(curves: Sequence[Curves], path: Path, *, smooth: bool = False, window: int = 10) -> None:
    """Write the KL estimate by step; PNG or SVG by the extension of `path`."""
    save(kl_figure(curves, smooth=smooth, window=window), path)


def svg(figure: Figure, *, prefix: str) -> str:
    """The figure as an SVG element with real text, for embedding; `prefix` makes its ids unique."""
    import matplotlib

    drawn = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "countdown", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=dict.fromkeys(SVG_METADATA))
    element = drawn.getvalue().partition("<svg")[2]
    return "<svg" + re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", element)


def training_figure(curves: Sequence[Curves], *, smooth: bool, window: int) -> Figure:
    """The figure of `training_curve`: accuracies, then the cells' if any, then rewards."""
    suites = any(run.cells for run in curves)
    figure, panels = _panels(curves, height=9.0 if suites else 6.0, ratios=(2, 2, 1) if suites else (2, 1))
    upper, lower = panels[0], panels[-1]
    for index, run in enumerate(curves):
        dots, place = divmod(index, len(COLOURS))
        colour = COLOURS[place]
        sampled = "train (sampled)" if run.temperature is None else f"train (sampled, T {run.temperature:g})"
        averaged = f"{sampled[:-1]}, centred mean of {window - 1 + window % 2:,})" if smooth else sampled
        _line(upper, run.accuracy, colour, dots, _label(averaged, run, curves), smooth=smooth, window=window)
        for order, (name, points) in enumerate(run.val.items()):
            val_colour = colour if len(curves) > 1 else COLOURS[(order + 1) % len(COLOURS)]
            marker = MARKERS[order % len(MARKERS)]
            greedy = f"{name} (greedy)" if name == "val" else name
            _markers(upper, points, val_colour, marker, _dashes(4, 2, dots=dots), _label(greedy, run, curves), run.best)
        for name, points in run.cells.items():
            split, numbers, style = name.split(" ", 2)
            cell_colour = STYLE_COLOURS[style] if len(curves) == 1 else colour
            dashes = _dashes(4, 2, dots=dots) if split == "val" else _dashes(1, 4, dots=dots)
            _markers(
                panels[1], points, cell_colour, MARKERS[int(numbers) - 3], dashes, _label(name, run, curves), run.best
            )
        _line(lower, run.reward, colour, dots, "", smooth=smooth, window=window)
    for axes in panels[:-1]:
        axes.set(ylabel=metric("accuracy").axis, ylim=(0, 1.02))
        axes.yaxis.set_major_formatter("{x:.0%}")
    lower.set_ylabel(metric("reward").axis)
    lower.set_ylim(bottom=0)
    if any(run.best for run in curves):
        upper.scatter([], [], s=100, color="#555555", marker="*", label="best model, saved")
    _legend(figure, *panels[:-1])
    return figure


def kl_figure(curves: Sequence[Curves], *, smooth: bool, window: int) -> Figure:
    """The figure of `kl_curve`."""
    figure, (axes,) = _panels(curves, height=3.6, ratios=(1,))
    for index, run in enumerate(curves):
        label = _label("KL", run, curves)
        dots, place = divmod(index, len(COLOURS))
        _line(axes, run.kl, COLOURS[place], dots, label, smooth=smooth, window=window)
    axes.set_ylabel(metric("kl").axis)
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        _legend(figure, axes)
    return figure


def _panels(curves: Sequence[Curves], *, height: float, ratios: Sequence[float]) -> tuple[Figure, list[Axes]]:
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend fails elsewhere, and files need none
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, height), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
    panels[0].set_title(_name(curves[0].name) if len(curves) == 1 else f"{len(curves)} runs", loc="left", weight="bold")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, panels


def _dashes(dash: float, gap: float, *, dots: int) -> Dashes:
    """A line style of one dash and `dots` dots, to distinguish runs of the same colour."""
    return (0, (dash, gap, *(1, 2) * dots))


def _line(axes: Axes, points: Series, colour: str, dots: int, label: str, *, smooth: bool, window: int) -> None:
    """Draw a curve, solid or with `dots`; if smoothed, the raw curve faintly behind its moving average."""
    if not points:
        return
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "." if len(points) == 1 else ""
    if smooth:
        axes.plot(steps, values, color=colour, marker=marker, alpha=0.25, linewidth=1)
        values = moving_average(values, window)
    style = _dashes(10, 2, dots=dots) if dots else "-"
    axes.plot(steps, values, color=colour, marker=marker, linestyle=style, label=label)


def _markers(
    axes: Axes, points: Series, colour: str, marker: str, dashes: Dashes, label: str, best: int | None
) -> None:
    """Draw a curve with markers, on some of its points if there are many. A star marks the best step."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    (line,) = axes.plot(steps, values, color=colour, marker=marker, linestyle=dashes, linewidth=1, label=label)
    line.set(markevery=math.ceil(len(points) / MOST_MARKERS), clip_on=False, zorder=3, markersize=4)
    if best is not None and best in steps:
        axes.scatter(
            best, dict(points)[best], s=140, color=colour, marker="*", edgecolors="white", clip_on=False, zorder=4
        )


def _label(curve: str, run: Curves, curves: Sequence[Curves]) -> str:
    return f"{_name(curve)} ({_name(run.name)})" if len(curves) > 1 else _name(curve)


def _name(text: str) -> str:
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
