"""What a terminal shows: messages, errors, tables, a model's words. Data goes to stdout, everything else to stderr.

All text that this program did not write itself passes `printable`. How a number was computed is not known here.
The view of a running training is in `live`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_cli.core.evals.statistics import NOT_SIGNIFICANT, holm, significant
from grpo_cli.core.metrics import CHEATS, SUITE, metric
from grpo_cli.ui.text import (
    _headed,
    accuracy,
    can_redraw,
    counted,
    err,
    excerpt,
    interval,
    note,
    out,
    percent,
    printable,
    probability,
    question,
    sparkline,
    warning,
)

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_cli.core.config.resolve import Resolved
    from grpo_cli.core.evals.compare import Paired, SuitePaired
    from grpo_cli.core.evals.evaluate import Completion, Evaluation, SuiteResult
    from grpo_cli.core.perf.memory import MemoryPlan
    from grpo_cli.core.rl.probe import Probe
    from grpo_cli.core.task.data import Summary
    from grpo_cli.core.task.puzzle import Puzzle
    from grpo_cli.core.task.scoring import Score
    from grpo_cli.ui.figures import Curves


ANSWER_CHARACTERS = 1_000
PROGRESS_SECONDS = 15.0  # between lines of progress where there is no terminal
SOLUTIONS = 10  # of a puzzle that are shown
REASONING_CHARACTERS = 20_000
COMPARISON_WIDTH = 76
WIDE = 100  # columns from which tables show what can be left out
CELL_WIDTH, ACCURACY_WIDTH = 28, 23  # of a matrix: its first columns, and each model's
# Letters and marks that Unicode counts as printable but that show as nothing.

EXPLANATIONS = {
    "no_answer": "no answer was given",
    "truncated": "it ran out of tokens before answering",
    "not_an_expression": "the answer is not an expression",
    "wrong_numbers": "the answer does not use each number exactly once",
    "wrong_value": "the answer does not make the target",
}


# Text


# Messages


# Tables


def _facts(rows: Iterable[tuple[str, str]]) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return Padding(table, (0, 0, 0, 2))


def _table(*columns: str, numeric: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    right = set(numeric)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in right, overflow="fold")
    return table


def gen_data_summary(summary: Summary, path: Path | None) -> None:
    """What a set of puzzles is made of, on stdout; on stderr if the puzzles went to stdout (`path` is None)."""
    console = err if path is None else out
    if path is not None:
        console.print(Text(f"{counted(summary.count, 'puzzle')} written to {printable(str(path))}", style="bold"))
    console.print(
        _facts(
            [
                ("split", f"{summary.train:,} train, {summary.val:,} val"),
                ("target", f"{summary.target_min} to {summary.target_max}, median {summary.target_median:g}"),
                ("needs parentheses", percent(summary.needs_parentheses)),
                ("solutions", f"{summary.solutions:.2f} on average"),
                ("duplicates", f"{summary.duplicates:,}"),
            ]
        )
    )


def runs(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per run: model, steps, base and best accuracy, time, settings that differ from its preset."""
    table = _table("run", "model", "step", "base", "best", "time", "settings", numeric=("step", "base", "best", "time"))
    for row in rows:
        if "error" in row:
            table.add_row(row["run"], printable(row["error"]), *[""] * 5)
            continue
        best = "-" if row["best_accuracy"] is None else percent(row["best_accuracy"])
        bounds = f" ({interval(row['interval'])})" if row["interval"] else ""
        base = "-" if row["base_accuracy"] is None else percent(row["base_accuracy"])
        changed = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row["settings"].items())
        step = f"{row['step']}/{row['num_iterations']}"
        table.add_row(
            row["run"],
            printable(row["model"]),
            step,
            base,
            best + bounds,
            f"{row['seconds']:,.0f} s",
            printable(changed),
        )
    out.print(table)


def config_table(resolved: Resolved) -> None:
    """Every setting with its value and the source of the value; what differs from the shipped default stands out."""
    table = _table("setting", "value", "source")
    settings = resolved.settings.model_dump()
    suites = {f"suite.{name}": counted(len(cells), "cell") for name, cells in settings.pop("suite").items()}
    for name, value in (*_flatten(settings), *suites.items()):
        source = resolved.sources[name]
        style = "dim" if source == "config.toml" else ""
        shown = json.dumps(value, ensure_ascii=False)
        table.add_row(name, Text(printable(shown)), Text(printable(source)), style=style)
    out.print(Text(printable(f"preset {resolved.settings.preset}: {resolved.preset_reason}"), style="bold"))
    out.print()
    out.print(table)


def _flatten(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def prompt_tokens(tokens: Sequence[tuple[int, str]]) -> None:
    """A prompt cut into its tokens, each an (id, text) pair, then the ids."""
    text = Text()
    for _, piece in tokens:
        text.append(printable(piece))
        text.append("\n" if piece.endswith("\n") else "·", style="cyan")
    text.rstrip()
    out.print(Text(f"a prompt of {len(tokens):,} tokens", style="bold"))
    out.print(Padding(text, (1, 0, 0, 2)))
    out.print(Padding(Text(" ".join(str(token) for token, _ in tokens), style="dim"), (1, 0, 0, 2)))


def memory_plan(plan: MemoryPlan) -> None:
    """What a training takes up, by component and phase in GB, what was chosen to make it fit, and why."""
    table = _table("memory in GB", *plan.phases, "of", numeric=plan.phases)
    for name, origin in plan.origins.items():
        sizes = [amounts.get(name, 0) for amounts in plan.phases.values()]
        if any(sizes):
            table.add_row(name, *(_gigabytes(size) if size else "" for size in sizes), Text(origin, style="dim"))
    sums = [sum(amounts.values()) for amounts in plan.phases.values()]
    table.add_row("total", *map(_gigabytes, sums), f"{_gigabytes(plan.room)} can be used", style="bold")
    out.print()
    out.print(table)
    out.print()
    out.print(Text(memory_line(plan), style="bold"))
    for reason in plan.reasons:
        out.print(Text(f"  {reason}", style="dim"))


def memory_line(plan: MemoryPlan) -> str:
    """A plan of memory in one line."""
    choices = plan.choices
    return ", ".join(
        [
            f"memory: {_gigabytes(plan.peak)} GB at most, {_gigabytes(plan.room)} GB can be used: micro-batches of "
            + (counted(choices.rows, "completion") if choices.rows else "the whole step"),
            f"gradient checkpointing {'on' if choices.checkpointing else 'off'}",
            *([f"logits of {choices.logit_chunk:,} tokens at a time"] if choices.logit_chunk else []),
            *([f"reference on the {'host' if choices.on_host else 'device'}"] if "reference" in plan.phases else []),
        ]
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def evaluation(result: Evaluation, *, examples: int = 3) -> None:
    """One model on one set of puzzles: accuracy, failures by reason, slices, and a few completions."""
    _headline(result)
    out.print()
    out.print(_reasons(result.reasons))
    out.print()
    out.print(_slices(result.slices))
    for completion in _examples(result, examples):
        out.print()
        _example(completion)


def _headline(result: Evaluation) -> None:
    puzzles = f"{counted(result.count, f'{result.split} puzzle')} of {result.numbers} numbers"
    out.print(Text.assemble((printable(result.model), "bold"), f"  {puzzles}, {result.style}, {_sampling(result)}"))
    rows = [
        ("accuracy", f"{percent(result.accuracy)}  (95% interval {interval(result.interval)})"),
        ("lenient accuracy", percent(result.lenient_accuracy)),
        ("format", percent(result.format_rate)),
        ("mean length", f"{result.mean_length:.1f} tokens"),
        ("decoding", f"up to {result.max_new_tokens} tokens, protocol {result.protocol}"),
    ]
    if result.known is not None:
        rows.append(("overlap", printable(result.known.statement(result.puzzles))))
    if result.pass_at_k is not None:
        rows.insert(1, (f"pass@{result.samples}", percent(result.pass_at_k)))
    total = sum(result.reasons.values())
    rows += [
        ("cheats", f"{percent(count / total)}  {CHEATS.get(kind, printable(kind))}")
        for kind, count in result.cheats.items()
    ]
    out.print(_facts(rows))


def _sampling(result: Evaluation) -> str:
    if not result.temperature:
        return "greedy"
    return f"{counted(result.samples, 'sample')} at temperature {result.temperature:g}"


def leaks(results: Sequence[SuiteResult]) -> None:
    """Warn of every model that was trained on puzzles that it was asked."""
    for result in results:
        asked = {f"{cell.split} {cell.numbers}": (cell.overlap, cell.count) for cell in result.cells}
        found = [f"{seen:,} of {count:,} {name}" for name, (seen, count) in asked.items() if seen]
        if found:
            warning(f"{result.model} was trained on puzzles that it was asked: {', '.join(found)}")


def _reasons(reasons: Mapping[str, int]) -> Table:
    total, room = sum(reasons.values()), min(max(out.width - 33, 0), 20)
    table = _table("outcome", "count", "share", "", numeric=("count", "share"))
    for reason, count in sorted(reasons.items(), key=lambda item: (item[0] != "correct", -item[1])):
        bar = Text("█" * round(room * count / total), style="green" if reason == "correct" else "red")
        table.add_row(reason, f"{count:,}", percent(count / total), bar)
    return table


def _slices(slices: Mapping[str, tuple[int, int]]) -> Table:
    table = _table("puzzles that have", "correct", "of", "accuracy", numeric=("correct", "of", "accuracy"))
    for name, (correct, count) in slices.items():
        table.add_row(name, f"{correct:,}", f"{count:,}", percent(correct / count) if count else "-")
    return table


def _examples(result: Evaluation, count: int) -> list[Completion]:
    """The first completion of each outcome, the most frequent outcome first."""
    first: dict[str, Completion] = {}
    for completion in chain.from_iterable(result.completions):
        first.setdefault(completion.score.reason, completion)
    return sorted(first.values(), key=lambda completion: -result.reasons[completion.score.reason])[:count]


def _example(completion: Completion) -> None:
    score = completion.score
    title = f"{printable(str(completion.puzzle))}  reward {score.reward}, {score.reason}"
    out.print(Text(title, style="bold"))
    out.print(Padding(excerpt(completion.text, width=max(out.width - 4, 10), lines=12), (0, 0, 0, 4)))


def comparison(results: Sequence[SuiteResult]) -> None:
    """One line for each of several evaluations of one cell; several lines each where the terminal is narrow."""
    if out.width < COMPARISON_WIDTH:
        for result in results:
            _headline(result.cells[0])
            out.print()
        return
    headers, rows = _comparison(results)
    table = _table(*headers, numeric=headers[2:])
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
    _provenance(results)


def _comparison(results: Sequence[SuiteResult]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            printable(result.model),
            result.style,
            str(result.numbers),
            f"{result.count:,}",
            accuracy(result.accuracy, result.interval),
            percent(result.lenient_accuracy),
            percent(result.format_rate),
            f"{result.mean_length:.1f}",
        ]
        for result in (result.cells[0] for result in results)
    ]
    return ["model", "style", "n", "count", "accuracy (95%)", "lenient", "format", "length"], rows


def suite(name: str, results: Sequence[SuiteResult]) -> None:
    """A matrix of accuracies, cells by models, in several blocks where the terminal is narrow."""
    weighted = sum(weight > 0 for weight in results[0].weights.values())
    cells = f"{counted(len(results[0].cells), 'cell')}, {weighted} of them in the weighted mean"
    out.print(Text.assemble((f"suite {printable(name)}", "bold"), f"  {cells}"))
    each = max(1, (out.width - CELL_WIDTH) // (ACCURACY_WIDTH + 2))
    for start in range(0, len(results), each):
        block = results[start : start + each]
        headers, rows = _matrix(block, weights=out.width >= WIDE)
        table = _table(*headers[: -len(block)], numeric=headers[1:])
        for header in headers[-len(block) :]:
            table.add_column(Text(header), justify="right", overflow="fold", max_width=ACCURACY_WIDTH)
        for row in rows:
            table.add_row(*map(Text, row))
        out.print()
        out.print(table)
    _provenance(results)


def _matrix(results: Sequence[SuiteResult], *, weights: bool) -> tuple[list[str], list[list[str]]]:
    """Cells by models; the last row holds the weighted means."""
    first = results[0]
    headers = ["cell", *(["weight"] if weights else []), "puzzles", *(printable(result.model) for result in results)]
    rows = [
        [
            asked.cell,
            *([f"{first.weights[asked.cell]:g}"] if weights else []),
            f"{asked.count:,}",
            *(accuracy(result.cells[index].accuracy, result.cells[index].interval) for result in results),
        ]
        for index, asked in enumerate(first.cells)
    ]
    blank = [""] * (len(headers) - len(results) - 1)
    return headers, [*rows, ["weighted mean", *blank, *(percent(result.mean) for result in results)]]


def _provenance(results: Sequence[SuiteResult]) -> None:
    """How completions were decoded, how long each model took, and what it was trained on."""
    out.print()
    out.print(Text(_decoding(results[0])))
    for line in map(_origin, results):
        out.print(Text(line))


def _decoding(result: SuiteResult) -> str:
    asked = result.cells[0]
    return f"decoded alike: {_sampling(asked)}, up to {asked.max_new_tokens} tokens, protocol {result.protocol}"


def _origin(result: SuiteResult) -> str:
    known = result.cells[0].known
    statement = f"; {known.statement(result.puzzles)}" if known else ""
    return printable(f"{result.model}: {result.seconds:.1f} s{statement}")


def paired(found: Paired) -> None:
    """What a second model solves that a first does not, and the reverse, with an example of both."""
    gained, lost = len(found.gained), len(found.lost)
    verdict = "" if significant(found.p_value) else f": {NOT_SIGNIFICANT}"
    out.print()
    out.print(
        Text.assemble(
            (_models(found), "bold"),
            f"  {counted(gained, 'puzzle')} gained, {lost:,} lost,"
            f" exact McNemar p {probability(found.p_value)}{verdict}",
        )
    )
    _pair_examples(found.gained, found.lost)


def suite_paired(found: SuitePaired) -> None:
    """What a second model gains and loses in each cell, with an example of both."""
    headers, rows = _gains(found, raw=out.width >= WIDE)
    table = _table(*headers, numeric=headers[1:-1])
    for row in rows:
        table.add_row(*map(Text, row))
    out.print()
    out.print(Text.assemble((_models(found), "bold"), "  exact McNemar, p corrected by Holm for the cells"))
    out.print()
    out.print(table)
    compared = found.cells.values()
    _pair_examples(
        list(chain.from_iterable(cell.gained for cell in compared)),
        list(chain.from_iterable(cell.lost for cell in compared)),
    )


def _gains(found: SuitePaired, *, raw: bool) -> tuple[list[str], list[list[str]]]:
    """Puzzles gained and lost by cell, p (if `raw`, uncorrected too), and what it does not show."""
    rows = [
        [
            name,
            f"{len(cell.gained):,}",
            f"{len(cell.lost):,}",
            *([probability(cell.p_value).removeprefix("= ")] if raw else []),
            probability(corrected).removeprefix("= "),
            "" if significant(corrected) else NOT_SIGNIFICANT,
        ]
        for (name, cell), corrected in zip(found.cells.items(), found.p_holm.values(), strict=True)
    ]
    return ["cell", "gained", "lost", *(["p"] if raw else []), "Holm p", ""], rows


def _models(found: Paired | SuitePaired) -> str:
    return f"{printable(found.first)} -> {printable(found.second)}"


def _pair_examples(
    gained: Sequence[tuple[Completion, Completion]], lost: Sequence[tuple[Completion, Completion]]
) -> None:
    for word, pairs in (("gained", gained), ("lost", lost)):
        for pair in pairs[:1]:
            puzzle = printable(str(pair[0].puzzle))
            answers = (f"{printable(_outcome(completion), limit=ANSWER_CHARACTERS)}" for completion in pair)
            out.print(Padding(Text(f"{word}: {puzzle}  {' -> '.join(answers)}"), (0, 0, 0, 2)))


def probe(found: Probe) -> None:
    """What a model could learn from in each style, the chosen one in bold, with a line for each finding."""
    chosen = found.styles[found.chosen]
    size = (
        f"{counted(len(chosen.right), 'train puzzle')} of {found.numbers} numbers, groups of {chosen.num_generations}"
    )
    out.print(Text(size, style="bold"))
    out.print()
    numeric = ("groups", "accuracy (95%)", "format", "mixed", "cut off", "length")
    table = _table("style", *numeric, numeric=numeric)
    for style, sampled in found.styles.items():
        table.add_row(
            style,
            str(len(sampled.right)),
            f"{percent(sampled.accuracy)} ({interval(sampled.interval)})",
            percent(sampled.format_rate),
            percent(sampled.mixed_share),
            percent(sampled.truncated),
            f"{sampled.mean_length:.1f}",
            style="bold" if style == found.chosen else "",
        )
    out.print(table)
    out.print()
    shares = [f"{size} {percent(share)}" for size, share in found.expected_mixed.items()]
    seconds, tokens = (sum(getattr(one, what) for one in found.styles.values()) for what in ("seconds", "tokens"))
    rows = [
        ("mixed", "groups whose rewards differ: what a step learns from"),
        ("estimate", f"groups with right and wrong completions, by size: {', '.join(shares)}"),
        ("cost", f"{seconds:.1f} seconds, {tokens:,} tokens"),
    ]
    out.print(_facts(rows))
    out.print()
    for sentence in found.findings.values():
        out.print(Text(sentence), soft_wrap=True)


def markdown(name: str | None, results: Sequence[SuiteResult], pairs: Sequence[SuitePaired]) -> None:
    """The results of a suite, or of one cell, and their comparison as Markdown."""
    headers, rows = _comparison(results) if name is None else _matrix(results, weights=True)
    title = "" if name is None else f"Suite {_escaped(printable(name))}, "
    lines = [f"{title}{_decoding(results[0])}", "", *_markdown_table(headers, rows), ""]
    lines += [f"- {_escaped(_origin(result))}" for result in results]
    for pair in pairs:
        lines += ["", f"{_escaped(_models(pair))}, exact McNemar:", "", *_markdown_table(*_gains(pair, raw=True))]
    for line in lines:
        out.print(Text(line), soft_wrap=True)


def _markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, all columns but the first right-aligned."""
    for row in (headers, None, *rows):
        cells = ["---", *["---:"] * (len(headers) - 1)] if row is None else map(_escaped, row)
        yield f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<|~])", r"\\\1", text)


def _outcome(completion: Completion) -> str:
    answer = completion.score.answer
    return completion.score.reason if answer is None else f"{answer} ({completion.score.reason})"


def sparklines(curves: Sequence[Curves]) -> None:
    """Each curve of each run as one line of blocks, with its first and last value."""
    width = min(max(out.width - 36, 4), 60)
    for run in curves:
        accuracies = {"train": run.accuracy, **run.val}
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


# A puzzle solved


def reasoning(chunks: Iterable[str]) -> str:
    """Show a completion, dimmed, as it is written, on stderr, as far as anybody reads; the whole of it comes back."""
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
    """The model's answer, alone on stdout."""
    out.print(Text(printable(text, limit=ANSWER_CHARACTERS)), soft_wrap=True)


def verdict(puzzle: Puzzle, score: Score) -> None:
    """What the scorer says of an answer, on stderr."""
    if score.correct:
        _headed("correct", "bold green", f"{score.answer} = {puzzle.target}")
    else:
        _headed("wrong", "bold red", EXPLANATIONS[score.reason])


def solutions(puzzle: Puzzle, found: Sequence[str]) -> None:
    """The solver's own solutions of a puzzle, on stderr: the first ten, and how many more."""
    err.print(Text(f"solutions of {question(puzzle.numbers, puzzle.target)}:", style="bold"))
    for solution in found[:SOLUTIONS]:
        err.print(Text(f"  {solution}"))
    if len(found) > SOLUTIONS:
        err.print(Text(f"  ... and {len(found) - SOLUTIONS:,} more"))


# A training or an evaluation at work


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr while the block runs, fed with (done, total); without a terminal a line now and then."""
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


def training_summary(summary: Mapping[str, Any], folder: Path, *, overlap: str) -> None:
    """What a training came to, on stdout; `overlap` says which of the val puzzles it was trained on."""
    base, final, best = (percent(summary[f"{name}_accuracy"]) for name in ("base", "final", "best"))
    spent, on_dev = summary["seconds"], summary.get("best_dev_accuracy")
    dev = "" if on_dev is None else f", the best on dev ({percent(on_dev)})"
    whole = spent["training"] + spent["evaluation"]
    out.print(Text(f"val accuracy on {counted(summary['puzzles'], 'puzzle')}, greedy", style="bold"))
    rows = [
        ("base", f"{base}, after the warm start" if summary.get("warm_start") else base),
        ("final", f"{final}  (95% interval {interval(summary['final_interval'])})"),
        ("best", f"{best}, after step {summary['best_step']}{dev}, saved as the run's model"),
        ("time", f"{whole:,.0f} s, {percent(spent['evaluation'] / whole if whole else 0.0)} of it in evaluations"),
        ("overlap", printable(overlap)),
        ("run", printable(str(folder))),
    ]
    if summary["bad_steps"]:
        count = summary["bad_steps"]
        rows.append(("skipped", f"{counted(count, 'step')} whose loss or gradient was not finite"))
    out.print(_facts(rows))
    if len(summary["peaks"]) > 1:
        out.print()
        out.print(_peaks(summary))
    if summary.get("phases"):
        out.print()
        out.print(_phases(summary["phases"]))
        for sentence in summary["verdict"]:
            out.print(Text(sentence))


def _phases(phases: Mapping[str, Mapping[str, float]]) -> Table:
    """Where the time went, and how near each phase came to the least that the hardware needs for it."""
    table = _table("phase", "seconds", "share", "floor", "of floor", numeric=("seconds", "share", "floor", "of floor"))
    for name, phase in phases.items():
        floor = phase.get("floor")
        bound = ("-", "-") if floor is None else (f"{floor:,.3g}", percent(floor / phase["seconds"]))
        table.add_row(name, f"{phase['seconds']:,.1f}", percent(phase["share"]), *bound)
    return table


def _peaks(summary: Mapping[str, Any]) -> Group:
    """When each cell of a suite was at its best, and what going on after the step that is kept has changed."""
    best, last = f"step {summary['best_step']}", f"step {summary['steps']}"
    columns = dict.fromkeys(["cell", "n", "start", "peak", best, last, "change", "Holm p"])
    p_values = holm([cell["p_value"] for cell in summary["peaks"].values()])
    table = _table(*columns, numeric=list(columns)[1:])
    for (name, cell), p_value in zip(summary["peaks"].items(), p_values, strict=True):
        cells = {"cell": name, "n": f"{cell['count']:,}", "start": percent(cell["start"])}
        cells |= {"peak": f"{percent(cell['accuracy'])} at {cell['step']}"}
        cells |= {best: percent(cell["kept"]), last: percent(cell["last"])}
        cells |= {"change": f"+{cell['gained']} -{cell['lost']}", "Holm p": probability(p_value).removeprefix("= ")}
        table.add_row(*(cells[column] for column in columns))
    spent = f"{summary['seconds_after_best']:,.0f} s after {best}"
    sure = [name for name, p_value in zip(summary["peaks"], p_values, strict=True) if significant(p_value)]
    words = "no cell has changed by more than chance" if not sure else f"changed by more than chance: {', '.join(sure)}"
    went = f"going on took {spent}; {words}" if summary["steps"] > summary["best_step"] else "the last step is the best"
    return Group(table, Text(f"\n{went} (exact McNemar from {best} to {last}, cell by cell)"))
