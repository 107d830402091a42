"""The view of a running training: a picture that redraws itself on a terminal, one plain line per step elsewhere.

It is told metrics, samples and accuracies, and does not know where they come from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_cli.ui import text as show

ROWS = 12
SAMPLE_LINES = 14
GAP = 2


@dataclass(frozen=True)
class Column:
    """A metric in the table; the higher its `rank`, the sooner a narrow terminal drops it."""

    key: str
    title: str
    form: str
    width: int
    rank: int

    def cell(self, metrics: Mapping[str, float]) -> str:
        return self.form.format(metrics[self.key]) if self.key in metrics else "-"


COLUMNS = (
    Column("step", "step", "{:.0f}", 5, 0),
    Column("reward", "reward", "{:.3f}", 6, 1),
    Column("accuracy", "accuracy", "{:.1%}", 8, 2),
    Column("format_rate", "format", "{:.1%}", 6, 3),
    Column("kl", "kl", "{:.4f}", 7, 4),
    Column("entropy", "entropy", "{:.3f}", 7, 8),
    Column("completion_length", "length", "{:.1f}", 6, 5),
    Column("truncated", "truncated", "{:.1%}", 9, 6),
    Column("zero_variance", "zero-var", "{:.1%}", 8, 9),
    Column("clip_fraction", "clip", "{:.1%}", 5, 14),
    Column("grad_norm", "grad norm", "{:.3f}", 9, 10),
    Column("weights_changed", "changed", "{:.1%}", 7, 13),
    Column("tokens_per_second", "tok/s", "{:,.0f}", 7, 11),
    Column("floor_share", "floor", "{:.1%}", 6, 12),
    Column("time/total", "s/step", "{:.2f}", 6, 7),
)
PHASES = (
    Column("time/rollout", "rollout", "{:.2f}s", 6, 15),
    Column("time/score", "score", "{:.2f}s", 6, 16),
    Column("time/reference", "reference", "{:.2f}s", 6, 17),
    Column("time/update", "update", "{:.2f}s", 6, 18),
)


def fitting(widths: Mapping[Column, int], width: int) -> list[Column]:
    """The most important columns that fit side by side, in the order given."""
    chosen = set()
    for column in sorted(widths, key=lambda column: column.rank):
        width -= widths[column] + GAP
        if width < -GAP:
            break
        chosen.add(column)
    return [column for column in widths if column in chosen]


@dataclass(frozen=True)
class Evaluated:
    """Accuracy on the val puzzles after a step."""

    step: int
    accuracy: float
    interval: tuple[float, float]
    suite_mean: float | None


class Unseen:
    """Shows nothing: another process of the same training has the view."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
    def progress(self, phase: str, done: int, total: int) -> None: ...
    def evaluated(
        self, step: int, accuracy: float, count: int, interval: tuple[float, float], suite_mean: float | None = None
    ) -> None: ...
    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None: ...
    def message(self, text: str) -> None: ...


class TrainingView:
    """Shows a training: enter it, tell it each step, leave it.

    The drawing thread of a terminal reads what the methods set; each of them replaces a whole tuple, never mends one.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start: int = 0,
        console: Console = show.err,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._console = console
        self._clock = clock
        self._opened = clock()
        self._first: tuple[int, float] | None = None
        self._last = (start, self._opened)
        self._rows: tuple[Mapping[str, float], ...] = ()
        self._rewards: tuple[float, ...] = ()
        self._evaluations: tuple[Evaluated, ...] = ()
        self._sample: Mapping[str, object] | None = None
        self._phase = ""
        self._live: Live | None = None
        if show.can_redraw(console):
            self._live = Live(self, console=console, refresh_per_second=2, redirect_stdout=False)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = ""
        if self._live:
            self._live.stop()

    # What the training tells

    def message(self, text: str) -> None:
        """A line that stays, above the picture."""
        self._console.print(Text(show.printable(text, keep_newlines=True)), soft_wrap=not self._live)

    def progress(self, phase: str, done: int, total: int) -> None:
        """How far the phase of the current step is; shown on a terminal only."""
        self._phase = f"{phase} {done:,} of {total:,}"

    def evaluated(
        self, step: int, accuracy: float, count: int, interval: tuple[float, float], suite_mean: float | None = None
    ) -> None:
        """Accuracy on `count` val puzzles after `step`, with its 95 % interval, and the mean of the suite's cells."""
        self._phase = ""
        self._evaluations = (*self._evaluations, Evaluated(step, accuracy, interval, suite_mean))
        if not self._live:
            shown = f"{show.percent(accuracy)} of {count:,} puzzles ({show.interval(interval)})"
            suite = "" if suite_mean is None else f", mean of the suite {show.percent(suite_mean)}"
            self.message(f"step {step}: val accuracy {shown}{suite}")

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None:
        """The metrics of a finished step and one of its completions, a record of samples.jsonl."""
        self._phase = ""
        self._last = (int(metrics["step"]), self._clock())
        self._first = self._first or self._last
        self._rows = (*self._rows, metrics)[-ROWS:]
        self._rewards = (*self._rewards, *([metrics["reward"]] if "reward" in metrics else []))
        self._sample = sample
        if not self._live:
            self.message(self._line(metrics))

    # What it shows

    def _line(self, metrics: Mapping[str, float]) -> str:
        """A step in one line: whole for a pipe, what fits for a terminal that cannot redraw."""
        step = f"step {metrics['step']:.0f} of {self._total}, {self._left()} left"
        cells = {column: f"{column.title} {column.cell(metrics)}" for column in (*COLUMNS[1:], *PHASES)}
        room = self._console.width - len(step) - GAP if self._console.is_terminal else sys.maxsize
        shown = fitting({column: len(cell) for column, cell in cells.items()}, room)
        return (GAP * " ").join([step, *(cells[column] for column in shown)])

    def _left(self) -> str:
        """The time that the remaining steps will take, at the pace so far; the first step only sets the clock."""
        step, now = self._last
        if step >= self._total:
            return "0:00:00"
        if not self._first or self._first[0] == step:
            return "-:--:--"
        pace = (now - self._first[1]) / (step - self._first[0])
        return _clock(pace * (self._total - step) - (self._clock() - now))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The picture of this moment, in a size that fits the terminal."""
        width, height = options.max_width, options.size.height
        fixed = 9 if self._evaluations else 8
        rows = min(max((height - fixed) // 2, 1), ROWS)
        lines = min(height - fixed - rows - 2, SAMPLE_LINES)
        yield self._header(width)
        yield Text(self._phase, style="dim", no_wrap=True, overflow="ellipsis")
        yield self._table(width, rows)
        yield self._curves(width)
        if self._sample is not None and lines > 0:
            yield _panel(self._sample, width, lines)
        yield Text()  # the `^C` that a terminal echoes must not wrap, or the next picture starts a line too low

    def _header(self, width: int) -> Table:
        step = self._last[0]
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        elapsed = f"{_clock(self._clock() - self._opened)} elapsed, " if width >= 60 else ""
        grid.add_row(
            Text(f"step {step} of {self._total}", style="bold"),
            ProgressBar(total=self._total, completed=step),
            Text(f"{step / self._total:4.0%}  {elapsed}{self._left()} left"),
        )
        return grid

    def _table(self, width: int, rows: int) -> Table:
        columns = fitting({column: column.width for column in COLUMNS}, width)
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column.title, justify="right", no_wrap=True, min_width=column.width)
        for metrics in self._rows[-rows:]:
            table.add_row(*(column.cell(metrics) for column in columns))
        return table

    def _curves(self, width: int) -> Text:
        """Reward, val accuracy and time by phase, each on one line."""
        spark = 0 if width < 60 else 10 if width < 100 else 32
        lines: list[tuple[str, Sequence[float], str]] = []
        if self._rewards:
            first, last = fmean(self._rewards[:10]), fmean(self._rewards[-10:])
            lines.append(("reward", self._rewards, f"first ten {first:.3f}, last ten {last:.3f}"))
        if self._evaluations:
            accuracies = [evaluated.accuracy for evaluated in self._evaluations]
            lines.append(("val", accuracies, _accuracies(self._evaluations)))
        if self._rows:
            lines.append(("time", (), _phases(self._rows[-1])))
        shown = Text("\n")
        for name, values, words in lines:
            blocks = show.sparkline(values, spark).ljust(spark + GAP if spark else 0)
            line = Text.assemble(f"{name:{6 + GAP}}", (blocks, "green"), words)
            line.truncate(width, overflow="ellipsis")
            shown.append_text(line).append("\n")
        shown.rstrip()
        return shown


def _accuracies(evaluations: tuple[Evaluated, ...]) -> str:
    start, latest = evaluations[0], evaluations[-1]
    accuracy, interval = show.percent(latest.accuracy), show.interval(latest.interval)
    if latest is start:
        return f"start {accuracy} ({interval})"
    best = show.percent(max(evaluated.accuracy for evaluated in evaluations))
    suite = "" if latest.suite_mean is None else f", suite {show.percent(latest.suite_mean)}"
    return f"start {show.percent(start.accuracy)}, step {latest.step} {accuracy} ({interval}), best {best}{suite}"


def _phases(metrics: Mapping[str, float]) -> str:
    return (GAP * " ").join(f"{phase.title} {phase.cell(metrics)}" for phase in PHASES)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _panel(sample: Mapping[str, object], width: int, lines: int) -> Panel:
    puzzle = show.printable(
        str(sample.get("problem") or f"{sample.get('numbers')} -> {sample.get('target')}"), limit=80
    )
    return Panel(
        show.excerpt(str(sample["completion"]), width=width - 4, lines=lines),
        title=Text(f"{puzzle}  reward {sample['reward']}, {sample['reason']}"),
        title_align="left",
        box=box.ROUNDED,
        border_style="dim",
        height=lines + 2,
    )
