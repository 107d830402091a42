"""Terminal output of the commands. Data goes to stdout, everything else to stderr.

All external text passes `printable`. `live` shows a running training, `eval_tables` the results of `eval`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_cli.core.config.settings import values
from grpo_cli.core.evals.statistics import holm
from grpo_cli.core.metrics import SUITE, metric
from grpo_cli.core.run.folder import at
from grpo_cli.ui.text import (
    can_redraw,
    counted,
    err,
    headed,
    interval,
    note,
    out,
    p_value,
    percent,
    printable,
    question,
    sparkline,
)

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_cli.core.config.resolve import Resolved
    from grpo_cli.core.perf.memory import MemoryPlan
    from grpo_cli.core.rl.probe import Probe
    from grpo_cli.core.task.data import Summary
    from grpo_cli.core.task.puzzle import Puzzle
    from grpo_cli.core.task.scoring import Score
    from grpo_cli.ui.figures import Curves


ANSWER_CHARACTERS = 1_000
PROGRESS_SECONDS = 15.0  # between progress lines without a terminal
SOLUTIONS = 10  # most solutions to show
REASONING_CHARACTERS = 20_000

RUNS = ("run", "model", "step", "base", "best", "time", "settings")
SEEDS = ("run", "seed", "steps", "base", "best", "at step", "last")

EXPLANATIONS = {
    "no_answer": "no answer was given",
    "truncated": "it ran out of tokens before answering",
    "not_an_expression": "the answer is not an expression",
    "wrong_numbers": "the answer does not use each number exactly once",
    "wrong_value": "the answer does not make the target",
}


def facts(rows: Iterable[tuple[str, str]]) -> Padding:
    """Names and values in two columns; what is not printable is escaped, as in every grid."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return Padding(table, (0, 0, 0, 2))


def grid(*columns: str, numeric: Iterable[str] = (), rows: Iterable[Iterable[str | Text]] = ()) -> Table:
    """A table with a line below its header; `numeric` columns are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    right = set(numeric)
    for name in columns:
        table.add_column(printable(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def gen_data_summary(summary: Summary, path: Path | None) -> None:
    """Summary of a set of puzzles on stdout; on stderr if the puzzles went to stdout (`path` is None)."""
    console = err if path is None else out
    if path is not None:
        console.print(Text(f"{counted(summary.count, 'puzzle')} written to {printable(str(path))}", style="bold"))
    console.print(
        facts(
            [
                ("split", f"{summary.train:,} train, {summary.val:,} val"),
                ("target", f"{summary.target_min} to {summary.target_max}, median {summary.target_median:g}"),
                ("duplicates", f"{summary.duplicates:,}"),
            ]
        )
    )


def runs(rows: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """One line per run: model, steps, base and best accuracy, time, settings that differ from its preset; seeds."""
    out.print(grid(*RUNS, numeric=RUNS[2:6], rows=map(_run, rows)))
    for group in groups:
        names, best = ", ".join(group["runs"]), f"{percent(group['mean'])} on average"
        out.print(Text(f"\n{printable(names)} differ only in the seed: best {best}, {interval(group['range'])}"))


def _run(row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return [row["run"], row["error"]]
    step, seconds = f"{row['step']}/{row['num_iterations']}", f"{row['seconds']:,.0f} s"
    best = _cell(row["best_accuracy"]) + (f" ({interval(row['interval'])})" if row["interval"] else "")
    changed = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row["settings"].items())
    return [row["run"], row["model"], step, _cell(row["base_accuracy"]), best, seconds, changed]


def _cell(value: object) -> str:
    """A share as percent, other values as text, `-` for None."""
    return "-" if value is None else percent(value) if isinstance(value, float) else str(value)


def seeds(rows: Sequence[Mapping[str, Any]], intervals: Mapping[str, tuple[float, float]]) -> None:
    """One line per seed of a training, then the means over seeds with intervals and the spread."""
    lines = [[_cell(row[name]) for name in SEEDS] for row in rows]
    out.print(grid(*SEEDS, numeric=SEEDS[1:], rows=lines))
    for key, bounds in intervals.items():
        values = [row[key] for row in rows]
        mean, spread = percent(fmean(values)), f"{percent(min(values))} to {percent(max(values))}"
        out.print(Text(f"{key}: {mean} on average ({interval(bounds)} by bootstrap over seeds), {spread}"))


def compared(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per cell of stored evaluations that are compared puzzle by puzzle."""
    columns = ("first", "second", "cell", "count", "gained", "lost")
    lines = [
        [
            *(str(row[name]) for name in columns),
            f"{percent(row['first_accuracy'])} -> {percent(row['second_accuracy'])}",
            p_value(row["p_holm"]),
        ]
        for row in rows
    ]
    more = ("accuracy", "Holm p")
    out.print(grid(*columns, *more, numeric=(*columns[3:], *more), rows=lines))


def plan_summary(resolved: Resolved, plan: MemoryPlan, prompt: str) -> None:
    """Whether a training fits in memory, the settings that are not the preset's, and a prompt."""
    out.print(Text(f"fits: {memory_line(plan).removeprefix('memory: ')}", style="bold"))
    out.print(Text(printable(f"preset {resolved.settings.preset}: {resolved.preset_reason}")))
    shipped = ("config.toml", f"preset {resolved.settings.preset}")
    if rows := [row for row in _settings(resolved) if row[2] not in shipped and row[0] != "preset"]:
        out.print()
        out.print(grid("setting", "value", "source", rows=rows))
    out.print()
    out.print(Text("a prompt", style="bold"))
    out.print(Padding(Text(printable(prompt, keep_newlines=True).rstrip()), (0, 0, 0, 2)))
    out.print(Text("all settings, token ids and the memory plan: add `-v`", style="dim"))


def config_table(resolved: Resolved) -> None:
    """Every setting with its value and source, and the suites."""
    suites = [
        (f"suite.{name}", counted(len(cells), "cell"), resolved.sources[f"suite.{name}"])
        for name, cells in resolved.settings.suite.items()
    ]
    out.print(grid("setting", "value", "source", rows=[*_settings(resolved), *suites]))


def _settings(resolved: Resolved) -> list[tuple[str, str, str]]:
    """Every setting with its value and source."""
    return [
        (key, json.dumps(value, ensure_ascii=False), resolved.sources[key])
        for key, value in values(resolved.settings).items()
    ]


def prompt_tokens(tokens: Sequence[tuple[int, str]]) -> None:
    """A prompt split into its tokens, (id, text) pairs, then the ids."""
    text = Text()
    for _, piece in tokens:
        text.append(printable(piece))
        text.append("\n" if piece.endswith("\n") else "·", style="cyan")
    text.rstrip()
    out.print(Text(f"a prompt of {len(tokens):,} tokens", style="bold"))
    out.print(Padding(text, (1, 0, 0, 2)))
    out.print(Padding(Text(" ".join(str(token) for token, _ in tokens), style="dim"), (1, 0, 0, 2)))


def memory_plan(plan: MemoryPlan) -> None:
    """Planned memory in GB by component and phase, and the choices of the planner."""
    table = grid("memory in GB", *plan.phases, numeric=plan.phases)
    for name in dict.fromkeys(name for amounts in plan.phases.values() for name in amounts):
        sizes = [amounts.get(name, 0) for amounts in plan.phases.values()]
        if any(sizes):
            table.add_row(name, *(_gigabytes(size) if size else "" for size in sizes))
    sums = [sum(amounts.values()) for amounts in plan.phases.values()]
    table.add_row("total", *map(_gigabytes, sums), style="bold")
    out.print()
    out.print(table)
    out.print()
    out.print(Text(memory_line(plan), style="bold"))


def memory_line(plan: MemoryPlan) -> str:
    """A memory plan in one line."""
    choices = plan.choices
    return ", ".join(
        [
            f"memory: {_gigabytes(plan.peak)} GB if every completion reaches the token limit",
            f"{_gigabytes(plan.room)} GB can be used",
            f"micro-batches of {counted(choices.rows, 'completion') if choices.rows else 'the whole step'}",
            f"gradient checkpointing {'on' if choices.checkpointing else 'off'}",
            *([f"logits of {choices.logit_chunk:,} tokens at a time"] if choices.logit_chunk else []),
            *([f"reference on the {'host' if choices.on_host else 'device'}"] if "reference" in plan.phases else []),
        ]
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def probe(probed: Probe) -> None:
    """Results of `train --probe` by style, and the findings."""
    chosen = probed.styles[probed.chosen]
    size = (
        f"{counted(len(chosen.right), 'train puzzle')} of {probed.numbers} numbers, groups of {chosen.num_generations}"
    )
    out.print(Text(size, style="bold"))
    out.print()
    numeric = ("groups", "accuracy (95%)", "format", "mixed", "cut off", "length")
    rows = [
        [
            style,
            str(len(sampled.right)),
            f"{percent(sampled.accuracy)} ({interval(sampled.interval)})",
            percent(sampled.format_rate),
            percent(sampled.mixed_share),
            percent(sampled.truncated),
            f"{sampled.mean_length:.1f}",
        ]
        for style, sampled in probed.styles.items()
    ]
    out.print(grid("style", *numeric, numeric=numeric, rows=rows))
    out.print()
    seconds, tokens = (sum(getattr(one, what) for one in probed.styles.values()) for what in ("seconds", "tokens"))
    explained = [
        ("mixed", "groups whose rewards differ: what a step learns from"),
        ("cost", f"{seconds:.1f} seconds, {tokens:,} tokens"),
    ]
    out.print(facts(explained))
    out.print()
    for sentence in probed.findings.values():
        out.print(Text(sentence), soft_wrap=True)


def sparklines(curves: Sequence[Curves]) -> None:
    """Each curve of each run as one line of blocks, with its first and last value."""
    width = min(max(out.width - 36, 4), 60)
    for run in curves:
        accuracies = {"train": run.accuracy, "val": run.val}
        shown = [(f"{name} accuracy", points, metric("accuracy")) for name, points in accuracies.items()]
        shown += [(name, points, metric(SUITE)) for name, points in run.cells.items()]
        shown += [(name, points, metric(name)) for name, points in (("reward", run.reward), ("kl", run.kl))]
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, points, declared in shown:
            values = [value for _, value in points]
            if values:
                line = Text(sparkline(values, width), style="green")
                table.add_row(printable(name), line, f"{declared.show(values[0])} -> {declared.show(values[-1])}")
        out.print(Text(printable(run.name), style="bold"))
        out.print(Padding(table, (0, 0, 0, 2)))


def reasoning(chunks: Iterable[str]) -> str:
    """Stream a completion, dimmed, to stderr while it is readable; returns the whole text."""
    text = ""
    for chunk in chunks:
        shown = chunk[: max(0, REASONING_CHARACTERS - len(text))]
        text += chunk
        err.print(Text(printable(shown, keep_newlines=True), style="dim"), end="", soft_wrap=True)
    if len(text) > REASONING_CHARACTERS:
        err.print(f"\n… {len(text) - REASONING_CHARACTERS:,} characters more …")
    elif not text.endswith("\n"):
        err.print()
    return text


def answer(text: str) -> None:
    """Print the model's answer on stdout."""
    out.print(Text(printable(text, limit=ANSWER_CHARACTERS)), soft_wrap=True)


def verdict(puzzle: Puzzle, score: Score) -> None:
    """Print the scorer's verdict on stderr."""
    if score.correct:
        headed("correct", "bold green", f"{score.answer} = {puzzle.target}")
    else:
        headed("wrong", "bold red", EXPLANATIONS[score.reason])


def solutions(puzzle: Puzzle, solutions_found: Sequence[str]) -> None:
    """Print the solver's solutions on stderr: the first ten, and the number of others."""
    err.print(Text(f"solutions of {question(puzzle.numbers, puzzle.target)}:", style="bold"))
    for solution in solutions_found[:SOLUTIONS]:
        err.print(Text(f"  {solution}"))
    if len(solutions_found) > SOLUTIONS:
        err.print(Text(f"  ... and {len(solutions_found) - SOLUTIONS:,} more"))


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr while the block runs, fed with (done, total); without a terminal, occasional lines."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(printable(title), markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not can_redraw(err)) as bar:
        task, last = bar.add_task("", total=None), time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            if bar.disable and not quiet and time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                note(f"{title}: {done} of {total}")

        yield advance


def training_summary(summary: Mapping[str, Any], folder: Path, *, overlap: str, change: str) -> None:
    """Summary of a finished training on stdout, then what to do next on stderr.

    `overlap` is a sentence on val puzzles that were trained on, `change` the verdict from the start to the best step.
    """
    base, final, best = (percent(summary[f"{name}_accuracy"]) for name in ("base", "final", "best"))
    spent, dev = summary["seconds"], percent(summary["best_dev_accuracy"])
    whole = spent["training"] + spent["evaluation"]
    out.print(Text(f"val accuracy on {counted(summary['puzzles'], 'puzzle')}, greedy", style="bold"))
    shown = [
        ("base", f"{base}, after the warm start" if summary.get("warm_start") else base),
        ("final", f"{final}  (95% interval {interval(summary['final_interval'])})"),
        ("best", f"{best}, after step {summary['best_step']}, the best on dev ({dev}), saved as the run's model"),
        ("change", change),
        ("time", f"{whole:,.0f} s, {percent(spent['evaluation'] / whole if whole else 0.0)} of it in evaluations"),
        ("overlap", overlap),
        ("run", str(folder)),
    ]
    if (broken := summary.get("broken", "none")) != "none":
        shown.append(("broken", f"a bug is planted on purpose: `--break {broken}`"))
    if summary["bad_steps"]:
        count = summary["bad_steps"]
        shown.append(("skipped", f"{counted(count, 'step')} whose loss or gradient was not finite"))
    out.print(facts(shown))
    if len(summary["peaks"]) > 1:
        _print_peaks(summary)
    if summary.get("phases"):
        rows = [(name, f"{one['seconds']:,.1f}", percent(one["share"])) for name, one in summary["phases"].items()]
        out.print()
        out.print(grid("phase", "seconds", "share", numeric=("seconds", "share"), rows=rows))
    name, place = printable(folder.name), at(folder.parent)
    for command in (f'solve "4 6 10 = 64" --model {name}', f"why {name}", f"plot {name} --report"):
        note(f"next: countdown {command}{place}")


def _print_peaks(summary: Mapping[str, Any]) -> None:
    """When each cell of a suite peaked, and what changed from the start to the best step."""
    best, last = f"step {summary['best_step']}", f"step {summary['steps']}"
    columns = [*dict.fromkeys(["cell", "n", "start", "peak", best, last, "change", "Holm p"])]
    tested = [name for name, cell in summary["peaks"].items() if cell["p_value"] is not None]
    p_values = dict(zip(tested, holm([summary["peaks"][name]["p_value"] for name in tested]), strict=True))
    rows = []
    for name, cell in summary["peaks"].items():
        cells = {"cell": name, "n": f"{cell['count']:,}", "start": percent(cell["start"])}
        cells |= {"peak": f"{percent(cell['accuracy'])} at {cell['step']}", best: percent(cell["kept"])}
        cells |= {last: percent(cell["last"]), "change": f"+{cell['gained']} -{cell['lost']}"}
        cells["Holm p"] = p_value(p_values[name]) if name in p_values else "-"
        rows.append([cells[column] for column in columns])
    spent = f"later steps took {summary['seconds_after_best']:,.0f} s after {best}; "
    later = spent if summary["steps"] > summary["best_step"] else "the last step is the best; "
    out.print()
    out.print(grid(*columns, numeric=columns[1:], rows=rows))
    out.print(Text(f"\n{later}change: start to best (exact McNemar); dev chose the best, so is not tested"))
