"""Output of `eval`: a model in detail, several side by side, suites and paired tests; also as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_cli.core.evals.statistics import NOT_SIGNIFICANT, significant
from grpo_cli.core.metrics import CHEATS
from grpo_cli.ui.tables import ANSWER_CHARACTERS, facts, grid
from grpo_cli.ui.text import (
    accuracy,
    counted,
    excerpt,
    interval,
    out,
    p_value,
    percent,
    printable,
    probability,
    warning,
)

if TYPE_CHECKING:
    from grpo_cli.core.evals.compare import Paired, SuitePaired
    from grpo_cli.core.evals.evaluate import Completion, Evaluation, SuiteResult


def evaluation(result: Evaluation, *, examples: int = 3) -> None:
    """One model on one set of puzzles: accuracy, failures by reason, and a few completions."""
    _headline(result)
    out.print()
    out.print(_reasons(result.reasons))
    for completion in _examples(result, examples):
        out.print()
        _example(completion)


def _headline(result: Evaluation) -> None:
    puzzles = counted(result.count, f"{result.split} puzzle") + f" of {result.numbers} numbers" * (result.numbers > 0)
    out.print(Text.assemble((printable(result.model), "bold"), f"  {puzzles}, {result.style}, {_sampling(result)}"))
    rows = [
        ("accuracy", f"{percent(result.accuracy)}  (95% interval {interval(result.interval)})"),
        ("lenient accuracy", percent(result.lenient_accuracy)),
        ("format", percent(result.format_rate)),
        ("mean length", f"{result.mean_length:.1f} tokens"),
        ("decoding", f"up to {result.max_new_tokens} tokens, protocol {result.protocol}"),
    ]
    if result.known is not None:
        rows.append(("overlap", result.known.statement(result.puzzles)))
    if result.pass_at_k is not None:
        rows.insert(1, (f"pass@{result.samples}", percent(result.pass_at_k)))
    total = sum(result.reasons.values())
    rows += [("cheats", f"{percent(count / total)}  {CHEATS.get(kind, kind)}") for kind, count in result.cheats.items()]
    out.print(facts(rows))


def _sampling(result: Evaluation) -> str:
    if not result.temperature:
        return "greedy"
    return f"{counted(result.samples, 'sample')} at temperature {result.temperature:g}"


def leaks(results: Sequence[SuiteResult]) -> None:
    """Warn about every model that was trained on evaluation puzzles."""
    for result in results:
        asked = {f"{cell.split} {cell.numbers}": (cell.overlap, cell.count) for cell in result.cells}
        shared = [f"{seen:,} of {count:,} {name}" for name, (seen, count) in asked.items() if seen]
        if shared:
            warning(f"{result.model} was trained on puzzles of this evaluation: {', '.join(shared)}")


def _reasons(reasons: Mapping[str, int]) -> Table:
    total, room = sum(reasons.values()), min(max(out.width - 33, 0), 20)
    rows = []
    for reason, count in sorted(reasons.items(), key=lambda item: (item[0] != "correct", -item[1])):
        bar = Text("█" * round(room * count / total), "green" if reason == "correct" else "red")
        rows.append((reason, f"{count:,}", percent(count / total), bar))
    return grid("outcome", "count", "share", "", numeric=("count", "share"), rows=rows)


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
    """One line per evaluation of one cell."""
    headers, rows = _comparison(results)
    out.print(grid(*headers, numeric=headers[2:], rows=rows))
    _provenance(results)


def _comparison(results: Sequence[SuiteResult]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            result.model,
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
    """A matrix of accuracies, cells by models."""
    weighted = sum(weight > 0 for weight in results[0].weights.values())
    cells = f"{counted(len(results[0].cells), 'cell')}, {weighted} of them in the weighted mean"
    out.print(Text.assemble((f"suite {printable(name)}", "bold"), f"  {cells}"))
    headers, rows = _matrix(results)
    out.print()
    out.print(grid(*headers, numeric=headers[1:], rows=rows))
    _provenance(results)


def _matrix(results: Sequence[SuiteResult]) -> tuple[list[str], list[list[str]]]:
    """Cells by models; the last row holds the weighted means."""
    first = results[0]
    rows = [
        [
            asked.cell,
            f"{asked.count:,}",
            *(accuracy(result.cells[index].accuracy, result.cells[index].interval) for result in results),
        ]
        for index, asked in enumerate(first.cells)
    ]
    headers = ["cell", "puzzles", *(result.model for result in results)]
    return headers, [*rows, ["weighted mean", "", *(percent(result.mean) for result in results)]]


def _provenance(results: Sequence[SuiteResult]) -> None:
    """Decoding settings, time per model, and contamination."""
    out.print()
    out.print(Text(_decoding(results[0])))
    for line in map(_origin, results):
        out.print(Text(printable(line)))


def _decoding(result: SuiteResult) -> str:
    asked = result.cells[0]
    return f"decoded alike: {_sampling(asked)}, up to {asked.max_new_tokens} tokens, protocol {result.protocol}"


def _origin(result: SuiteResult) -> str:
    known = result.cells[0].known
    statement = f"; {known.statement(result.puzzles)}" if known else ""
    return f"{result.model}: {result.seconds:.1f} s{statement}"


def paired(pair: Paired) -> None:
    """Puzzles that only one of two models solves, with an example of each."""
    gained, lost = len(pair.gained), len(pair.lost)
    verdict = "" if significant(pair.p_value) else f": {NOT_SIGNIFICANT}"
    out.print()
    out.print(
        Text.assemble(
            (_models(pair), "bold"),
            f"  {counted(gained, 'puzzle')} gained, {lost:,} lost,"
            f" exact McNemar p {probability(pair.p_value)}{verdict}",
        )
    )
    _pair_examples(pair.gained, pair.lost)


def suite_paired(pair: SuitePaired) -> None:
    """Puzzles gained and lost in each cell, with an example of each."""
    headers, rows = _gains(pair)
    out.print()
    out.print(Text.assemble((_models(pair), "bold"), "  exact McNemar, p corrected by Holm for the cells"))
    out.print()
    out.print(grid(*headers, numeric=headers[1:-1], rows=rows))
    compared = pair.cells.values()
    _pair_examples(
        list(chain.from_iterable(cell.gained for cell in compared)),
        list(chain.from_iterable(cell.lost for cell in compared)),
    )


def _gains(pair: SuitePaired) -> tuple[list[str], list[list[str]]]:
    """Puzzles gained and lost by cell, p corrected for the cells, and a mark if not significant."""
    rows = [
        [
            name,
            f"{len(cell.gained):,}",
            f"{len(cell.lost):,}",
            p_value(corrected),
            "" if significant(corrected) else NOT_SIGNIFICANT,
        ]
        for (name, cell), corrected in zip(pair.cells.items(), pair.p_holm.values(), strict=True)
    ]
    return ["cell", "gained", "lost", "Holm p", ""], rows


def _models(pair: Paired | SuitePaired) -> str:
    return f"{printable(pair.first)} -> {printable(pair.second)}"


def _pair_examples(
    gained: Sequence[tuple[Completion, Completion]], lost: Sequence[tuple[Completion, Completion]]
) -> None:
    for word, pairs in (("gained", gained), ("lost", lost)):
        for pair in pairs[:1]:
            puzzle = printable(str(pair[0].puzzle))
            answers = (f"{printable(_outcome(completion), limit=ANSWER_CHARACTERS)}" for completion in pair)
            out.print(Padding(Text(f"{word}: {puzzle}  {' -> '.join(answers)}"), (0, 0, 0, 2)))


def markdown(name: str | None, results: Sequence[SuiteResult], pairs: Sequence[SuitePaired]) -> None:
    """The results of a suite, or of one cell, and their comparison as Markdown."""
    headers, rows = _comparison(results) if name is None else _matrix(results)
    title = "" if name is None else f"Suite {_escaped(name)}, "
    lines = [f"{title}{_decoding(results[0])}", "", *_markdown_table(headers, rows), ""]
    lines += [f"- {_escaped(_origin(result))}" for result in results]
    for pair in pairs:
        lines += ["", f"{_escaped(_models(pair))}, exact McNemar:", "", *_markdown_table(*_gains(pair))]
    for line in lines:
        out.print(Text(printable(line)), soft_wrap=True)


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
