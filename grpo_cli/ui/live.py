"""The view of a running training: a live display on a terminal, otherwise one plain line per step.

core/metrics.py declares which metrics it shows.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_cli.core.metrics import PHASES, TABLE, Metric, metric
from grpo_cli.core.rl.observer import Observer, Validated
from grpo_cli.core.run.folder import Run
from grpo_cli.ui import text as show

ROWS = 12
SAMPLE_LINES = 14
GAP = 2
QUIET_SECONDS = 2.0  # of a phase, after which a pipe gets a first line
STEP_SECONDS = 15.0  # between further lines, and before the first one of a step
BRANCH = 16  # characters shown on each side of a group's first difference


def fitting(width: int) -> list[Metric]:
    """The most important columns of the table that fit side by side."""
    chosen = set()
    for column in sorted(TABLE, key=lambda column: column.rank):
        width -= column.width + GAP
        if width < -GAP:
            break
        chosen.add(column)
    return [column for column in TABLE if column in chosen]


@dataclass(frozen=True)
class _Phase:
    """What a training is doing, and since when, `first` being done then: more than 1 in a training that goes on."""

    name: str
    done: int
    total: int
    since: float
    first: int

    @property
    def kind(self) -> str:
        return _kind(self.name)

    @property
    def is_steps(self) -> bool:
        """Whether it counts steps, whose time left can be estimated; completions rarely reach the token limit."""
        return self.name.endswith("step")

    def left(self, now: float) -> str:
        seen = self.done - self.first
        return _clock((now - self.since) / seen * (self.total - self.done)) if seen > 0 else "-:--:--"

    def line(self, now: float) -> str:
        left = f", {self.left(now)} left" if self.is_steps else ""
        return f"{self.name} {self.done:,} of {self.total:,}{left}"


def _kind(phase: str) -> str:
    """The part of a phase's name without numbers that change: `warm start: loss 0.3, step` -> `warm start`."""
    return re.split("[,:]", phase)[0]


class TrainingView(Observer):
    """Shows a training: a context manager and an observer of the loop.

    The drawing thread reads the attributes that methods set, so methods replace whole tuples and never modify them.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        console: Console = show.err,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._console = console
        self._clock = clock
        self._opened = clock()
        self._first: tuple[int, float] | None = None
        self._last = (0, self._opened)
        self._rows: tuple[Mapping[str, float], ...] = ()
        self._rewards: tuple[float, ...] = ()
        self._evaluations: tuple[Validated, ...] = ()
        self._sample: Mapping[str, Any] | None = None
        self._group = ""
        self._phase: _Phase | None = None
        self._said = self._opened  # when a pipe got its last line
        self._live: Live | None = None
        if show.can_redraw(console):
            self._live = Live(self, console=console, refresh_per_second=2, redirect_stdout=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = None
        if self._live:
            self._live.stop()

    # Called by the training loop

    def begin(self, run: Run, step: int) -> None:
        """Start the display after `step`."""
        self._last, self._phase = (step, self._clock()), None
        if self._live:
            self._live.start(refresh=True)

    def message(self, text: str) -> None:
        """Print a line above the display."""
        self._said = self._clock()
        self._console.print(
            Text(show.printable(text, keep_newlines=True)), soft_wrap=not (self._live and self._live.is_started)
        )

    def progress(self, phase: str, done: int, total: int) -> None:
        """Update the phase; a pipe gets a line if it has heard nothing for a while."""
        now, before = self._clock(), self._phase
        since, first = (before.since, before.first) if before and before.kind == _kind(phase) else (now, done)
        self._phase = _Phase(phase, done, total, since, first)
        if self._live and not self._live.is_started:  # a warm start, before the first step
            self._live.start(refresh=True)
        pause = STEP_SECONDS if phase.startswith("sampling") or self._said > since else QUIET_SECONDS
        if not self._live and now - max(since, self._said) >= pause:
            self.message(self._phase.line(now))

    def evaluated(self, result: Validated) -> None:
        """Show val accuracy with its 95 % interval, dev accuracy, and the suite's weighted mean."""
        self._phase = None
        self._evaluations = (*self._evaluations, result)
        if not self._live:
            counted, interval = show.counted(result.count, "puzzle"), show.interval(result.interval)
            shown = f"{show.percent(result.accuracy)} of {counted} ({interval})"
            suite = "" if result.suite_mean is None else f", mean of the suite {show.percent(result.suite_mean)}"
            dev = "" if result.dev_accuracy is None else f", dev {show.percent(result.dev_accuracy)}"
            self.message(f"step {result.step}: val accuracy {shown}{dev}{suite}{_sampled(result)}")

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step and one of its completions, a record of samples.jsonl."""
        self._phase = None
        self._last = (int(metrics["step"]), self._clock())
        self._first = self._first or self._last
        self._rows = (*self._rows, metrics)[-ROWS:]
        self._rewards = (*self._rewards, *([metrics["reward"]] if "reward" in metrics else []))
        self._sample, self._group = sample, group_line(sample)
        if not self._live:
            self.message(self._line(metrics))

    # Shown

    def _line(self, metrics: Mapping[str, float]) -> str:
        """A step in one line."""
        step = f"step {metrics['step']:.0f} of {self._total}, {self._left()} left"
        cells = [f"{column.title} {column.cell(metrics)}" for column in (*TABLE[1:], *PHASES)]
        return (GAP * " ").join([step, *cells, *([f"group: {self._group}"] if self._group else [])])

    def _left(self) -> str:
        """Estimated time left; the first step only starts the clock."""
        step, now = self._last
        if step >= self._total:
            return "0:00:00"
        if not self._first or self._first[0] == step:
            return "-:--:--"
        pace = (now - self._first[1]) / (step - self._first[0])
        return _clock(pace * (self._total - step) - (self._clock() - now))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The current display, sized to the terminal."""
        width, height = options.max_width, options.size.height
        fixed = 8 + bool(self._evaluations) + bool(self._group)
        rows = min(max((height - fixed) // 2, 1), ROWS)
        lines = min(height - fixed - rows - 2, SAMPLE_LINES)
        yield self._header(width)
        phase = self._phase.line(self._clock()) if self._phase else ""
        yield Text(phase, style="dim", no_wrap=True, overflow="ellipsis")
        if self._rows:
            yield self._table(width, rows)
        yield self._curves(width)
        if self._sample is not None and lines > 0:
            yield _panel(self._sample, width, lines)
        yield Text()  # room for an echoed `^C`: if it wrapped, the next redraw would start a line too low

    def _header(self, width: int) -> Table:
        step, phase = self._last[0], self._phase
        title, done, total, left = f"step {step} of {self._total}", step, self._total, self._left()
        if phase and phase.is_steps:  # a warm start
            title, done, total, left = phase.kind, phase.done, phase.total, phase.left(self._clock())
        elif phase and not self._rows and step == 0:
            title = "starting model"
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        elapsed = f"{_clock(self._clock() - self._opened)} elapsed, " if width >= 60 else ""
        grid.add_row(
            Text(title, style="bold"),
            ProgressBar(total=total, completed=done),
            Text(f"{done / total:4.0%}  {elapsed}{left} left"),
        )
        return grid

    def _table(self, width: int, rows: int) -> Table:
        columns = fitting(width)
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
            first, last = (metric("reward").show(fmean(part)) for part in (self._rewards[:10], self._rewards[-10:]))
            lines.append(("reward", self._rewards, f"first ten {first}, last ten {last}"))
        if self._evaluations:
            accuracies = [evaluated.accuracy for evaluated in self._evaluations]
            lines.append(("val", accuracies, _accuracies(self._evaluations)))
        if self._rows:
            lines.append(("time", (), _phases(self._rows[-1])))
        if self._group:
            lines.append(("group", (), self._group))
        shown = Text("\n")
        for name, values, words in lines:
            blocks = show.sparkline(values, spark).ljust(spark + GAP if spark else 0)
            line = Text.assemble(f"{name:{6 + GAP}}", (blocks, "green"), words)
            line.truncate(width, overflow="ellipsis")
            shown.append_text(line).append("\n")
        shown.rstrip()
        return shown


def _accuracies(evaluations: tuple[Validated, ...]) -> str:
    start, latest = evaluations[0], evaluations[-1]
    accuracy, interval = show.percent(latest.accuracy), show.interval(latest.interval)
    if latest is start:
        return f"start {accuracy} ({interval}){_sampled(latest)}"
    best = show.percent(_best(evaluations[1:]).accuracy)
    suite = "" if latest.suite_mean is None else f", suite {show.percent(latest.suite_mean)}"
    now = f"step {latest.step} {accuracy} ({interval}){_sampled(latest)}"
    return f"start {show.percent(start.accuracy)}, {now}, best {best}{suite}"


def _sampled(result: Validated) -> str:
    """The accuracy of sampled completions, and pass@k, where they were evaluated."""
    if result.sampled is None:
        return ""
    accuracy, solved = map(show.percent, result.sampled)
    return f", sampled {accuracy}, pass@k {solved}"


def _best(evaluations: tuple[Validated, ...]) -> Validated:
    """The first evaluation with the highest dev accuracy, or without dev the highest val accuracy."""
    return max(evaluations, key=lambda one: one.accuracy if one.dev_accuracy is None else one.dev_accuracy)


def _phases(metrics: Mapping[str, float]) -> str:
    return (GAP * " ").join(f"{phase.title} {phase.cell(metrics)}" for phase in PHASES)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def group_line(sample: Mapping[str, Any]) -> str:
    """A group in one line: verdicts with reward and advantage, and where its best and worst completions part."""
    rows = sorted(sample.get("group", ()), key=lambda row: float(row["advantage"]), reverse=True)
    verdicts = Counter((row["reason"], float(row["reward"]), float(row["advantage"])) for row in rows)
    shown = [
        f"{count} {reason.replace('_', ' ')} {reward:.2f} ({advantage:+.2f})"
        for (reason, reward, advantage), count in verdicts.items()
    ]
    if len(shown) > 1:
        best, worst = rows[0]["completion"], rows[-1]["completion"]
        pairs = enumerate(zip(best, worst, strict=False))
        start = next((index for index, (one, other) in pairs if one != other), min(len(best), len(worst)))
        ends = [repr(text[start : start + BRANCH]) for text in (best, worst)]
        shown.append(f"part after {best[max(0, start - BRANCH) : start]!r}: {ends[0]} or {ends[1]}")
    return show.printable(", ".join(shown))


def _panel(sample: Mapping[str, Any], width: int, lines: int) -> Panel:
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
