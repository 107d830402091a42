"""An HTML report of one run or several: self-contained, works offline, prints on A4.

`account` provides the data. All external text is passed through `printable` and escaped, and the page's content
security policy forbids scripts and requests.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from grpo_cli import __version__
from grpo_cli.core import files
from grpo_cli.core.config.settings import FIELDS
from grpo_cli.core.evals.statistics import NOT_SIGNIFICANT, holm, significant
from grpo_cli.core.metrics import METRICS
from grpo_cli.core.rl.health import collapses, warnings
from grpo_cli.core.run.logs import Evaluated, Example
from grpo_cli.ui import figures as plot
from grpo_cli.ui.account import Account, Change, change, puzzles
from grpo_cli.ui.figures import Curves, Series
from grpo_cli.ui.text import EXCERPT_CHARACTERS, interval, percent, printable, probability

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_suffix(".css")
SMALLER = 0.8  # scale of images, to match the page's text size
TITLED = 3  # most runs named in the title
DRAWN = 2  # completions shown per training step
UNTESTED = "Solved puzzles were not recorded, so the difference cannot be tested."

# Markup


class Html(str):
    """Markup. All other text is escaped when it is put into an element."""


def element(name: str, *content: object, **attributes: str) -> Html:
    """An element; `aria_hidden` is `aria-hidden`, `class_` is `class`. Anything but `Html` is escaped text."""
    keep = name == "pre"
    inside = "".join(part if isinstance(part, Html) else _text(str(part), keep_newlines=keep) for part in content)
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value}
    given = "".join(f' {key}="{_text(value)}"' for key, value in named.items())
    return Html(f"<{name}{given}>{inside}</{name}>")


def _text(text: str, *, keep_newlines: bool = False) -> str:
    return html.escape(printable(text, keep_newlines=keep_newlines))


def _all(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else _text(part) for part in parts))


def _table(head: Sequence[object], rows: Iterable[Sequence[object]], *, kind: str = "") -> Html:
    """A table whose first column has row headers."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    table = element("table", element("thead", top), element("tbody", *body), class_=kind)
    return element("div", table, class_="wide")


def _small(*content: object) -> Html:
    return element("small", *content)


def _folded(summary: str, *content: Html, kind: str = "") -> Html:
    return element("details", element("summary", summary), *content, class_=kind)


# The page


def page(accounts: Sequence[Account], *, defaults: Mapping[str, object], smooth: bool = False, window: int = 10) -> str:
    """The whole page. `defaults` are the shipped settings by key; `smooth` averages curves over `window` steps."""
    names = [account.name for account in accounts]
    title = ", ".join(names) if len(names) <= TITLED else f"{len(names)} runs"
    sections = [
        ("", _all(_headline(account, titled=len(names) > 1) for account in accounts)),
        ("Curves", _figures([account.curves for account in accounts], smooth=smooth, window=window)),
        ("Accuracy, cell by cell", _each(accounts, _matrix)),
        ("Comparison", _comparison(accounts)),
        ("Samples, before and after", _each(accounts, _samples)),
        ("Failures by kind", _each(accounts, _failures)),
        ("Health", _each(accounts, _health)),
        ("Configuration", _configuration([account for account in accounts if account.settings], defaults)),
        ("Environment", _environment(accounts)),
    ]
    body = element(
        "main",
        element("header", element("p", "countdown report", class_="over"), element("h1", title)),
        *(element("section", _heading(name), content) for name, content in sections if content),
        element("footer", f"countdown {__version__} · ", element("code", f"countdown plot {' '.join(names)} --report")),
    )
    head = element("title", f"{title} · countdown report") + element("style", Html(STYLE.read_text("utf-8")))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{head}</head>\n<body>{body}</body></html>\n'
    )


def write(text: str, path: Path) -> None:
    """Write a page atomically."""
    files.write(path, text.encode())


def _heading(name: str) -> Html:
    return element("h2", name) if name else Html("")


def _each(accounts: Sequence[Account], tell: Callable[[Account], Html]) -> Html:
    """The output of `tell` for each run, if any, under the run's name if there are several."""
    parts = [(account.name, part_of) for account in accounts if (part_of := tell(account))]
    return _all(part for name, part_of in parts for part in ([element("h3", name)] * (len(accounts) > 1) + [part_of]))


# Headline


def _headline(account: Account, *, titled: bool) -> Html:
    scores = [_score(word, account.own[step]) for word, step in account.stations[:2]]
    return element(
        "article",
        *([element("h3", account.name)] * titled),
        element("p", _story(account), class_="story"),
        *([element("div", *scores, class_="scores")] if scores else []),
        element("p", _verdict(account), class_="verdict"),
    )


def _story(account: Account) -> str:
    """Model, settings and duration of the training."""
    values = account.settings
    if not values:
        return f"The curves of a file of metrics, to step {account.steps:,}."
    seconds = sum(line.get("time/total", 0) + line.get("time/eval", 0) for line in account.metrics)
    taken, planned = account.steps, values["train.num_iterations"]
    steps = f"{taken:,} steps" if account.summary or taken == planned else f"{taken:,} of {planned} steps so far"
    style, numbers = (
        values[f"task.{key}"] if values[f"train.prompt_{key}"] == "task" else values[f"train.prompt_{key}"]
        for key in ("style", "numbers")
    )
    return (
        f"{_shown(values['model.model'])}, trained on {_shown(style)} puzzles of {_shown(numbers)} numbers: "
        f"{steps}, each of {values['train.batch_size']} prompts with {values['train.num_generations']} completions, "
        f"in {_duration(seconds)}."
    )


def _score(word: str, evaluation: Evaluated) -> Html:
    bounds = (
        f"95 % interval {interval(evaluation.interval)}" if evaluation.interval else "how many puzzles is not known"
    )
    return element(
        "div",
        element("p", word if evaluation.step == 0 else f"{word}, step {evaluation.step:,}", class_="over"),
        element("p", percent(evaluation.accuracy), class_="number"),
        _strip(evaluation),
        element("p", f"{bounds}" + (f", {evaluation.count:,} puzzles" if evaluation.count else ""), class_="soft"),
    )


def _strip(evaluation: Evaluated) -> Html:
    """An accuracy and its interval as a mark on a line from 0 to 1."""
    low, high = evaluation.interval or (evaluation.accuracy, evaluation.accuracy)
    band = element("i", style=f"left:{low:.2%};right:{1 - high:.2%}")
    return element(
        "span", band, element("b", style=f"left:{evaluation.accuracy:.2%}"), class_="strip", aria_hidden="true"
    )


def _verdict(account: Account) -> str:
    """One sentence; claims only differences that the exact test supports."""
    best = account.own.get(account.best or 0)
    if best is None or best.step == 0:
        return "Nothing has been evaluated after training yet."
    difference = change(account.own.get(0), best)
    if difference is None:
        return UNTESTED if 0 in account.own else "The starting model was not evaluated, so there is no comparison."
    p_value = account.corrected(difference)
    chosen = f", corrected for choosing the best of {account.looks} evaluations" if account.looks > 1 else ""
    counts = f"{difference.gained:,} of {best.count:,} puzzles gained and {difference.lost:,} lost"
    test = f"{counts} (exact McNemar p {probability(p_value)}{chosen})"
    if not significant(p_value):
        return f"Not significant: {test}."
    return f"The model {'improved' if difference.gained > difference.lost else 'got worse'}: {test}."


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s" if minutes else f"{left} s"


# Curves


def _figures(curves: Sequence[Curves], *, smooth: bool, window: int) -> Html:
    drawn = {
        "Accuracy and reward; stars are peaks": plot.training_figure(curves, smooth=smooth, window=window),
        "KL from the reference model": plot.kl_figure(curves, smooth=smooth, window=window),
    }
    shown = []
    for number, (caption, figure) in enumerate(drawn.items(), start=1):
        figure.set_size_inches(*(SMALLER * figure.get_size_inches()))
        picture = Html(plot.svg(figure, prefix=f"figure{number}"))
        shown.append(element("figure", picture, element("figcaption", caption)))
    return element("div", *shown, class_="figures")


# Accuracy


def _matrix(account: Account) -> Html:
    stations = account.stations
    if not stations:
        return Html("")
    rows, tested = [], False
    for name, steps in account.cells.items():
        difference = change(steps.get(0), steps.get(account.best or 0)) if account.best else None
        tested = tested or difference is not None
        marks = [_accuracy(steps.get(step)) for _, step in stations]
        changed = _changed(difference, account.corrected(difference)) if difference else "-"
        rows.append([_all([name, _small(_about(account, steps))]), *marks, changed])
    titles = [_all([word, _small(f"step {step:,}")]) for word, step in stations]
    table = _table(["cell", *titles, "start to best"], rows, kind="numbers")
    looks = (
        f", multiplied by {account.looks}: the evaluations that the best was chosen from." if account.looks > 1 else "."
    )
    note = (
        "Bands are 95 % intervals. Puzzles gained and lost from the start to the best step, with the p value of the "
        f"exact McNemar test{looks}{' The best step was chosen on dev.' if account.chosen_on_dev else ''}"
    )
    return _all([table, element("p", note if tested else UNTESTED, class_="soft")])


def _about(account: Account, steps: Mapping[int, Evaluated]) -> str:
    """Number of puzzles of a cell, and where it peaked if not at the best step."""
    count = max(evaluation.count for evaluation in steps.values())
    peak = max(steps.values(), key=lambda one: one.accuracy)
    best = steps.get(account.best or 0)
    beaten = best is not None and peak.accuracy > best.accuracy
    words = [f"{count:,} puzzles"] * (count > 0) + [f"peak {percent(peak.accuracy)} at step {peak.step:,}"] * beaten
    return ", ".join(words)


def _accuracy(evaluation: Evaluated | None) -> Html | str:
    if evaluation is None:
        return "-"
    bounds = _small(interval(evaluation.interval)) if evaluation.interval else Html("")
    return _all([element("span", percent(evaluation.accuracy)), bounds, _strip(evaluation)])


def _changed(difference: Change, p_value: float) -> Html:
    test = element("small", f"p {probability(p_value)}", class_="whole")
    return _all([f"+{difference.gained:,} −{difference.lost:,}", test])


# Comparison


def _comparison(accounts: Sequence[Account]) -> Html:
    return _all(_compared(accounts[0], other) for other in accounts[1:])


def _compared(first: Account, second: Account) -> Html:
    """Two runs on each common cell, by their best models and by their last ones."""
    pairs: list[tuple[str, Evaluated | None, Evaluated | None]] = []
    for cell in (name for name in first.cells if name in second.cells):
        one, other = first.cells[cell], second.cells[cell]
        best = (one.get(first.best or -1), other.get(second.best or -1))
        last = (one[max(one)], other[max(other)])
        pairs += [("best and last", *best)] if best == last else [("best", *best), ("last", *last)]
    differences = [
        (word, one, other, tested) for word, one, other in pairs if (tested := change(one, other)) and one and other
    ]
    title = element("h3", f"{first.name} → {second.name}")
    if not differences:
        return _all([title, element("p", "The runs have no common cell with the same puzzles.", class_="soft")])
    adjusted = holm([tested.p_value for *_, tested in differences])
    rows = [
        [
            _all([one.cell, _small(f"{word} models, {one.count:,} puzzles")]),
            _all([percent(one.accuracy), _small(f"step {one.step:,}")]),
            _all([percent(other.accuracy), _small(f"step {other.step:,}")]),
            _changed(tested, p_value),
            _winner(tested, p_value, first.name, second.name),
        ]
        for (word, one, other, tested), p_value in zip(differences, adjusted, strict=True)
    ]
    honest = first.chosen_on_dev and second.chosen_on_dev
    chosen = "on dev." if honest else "on these puzzles, the last ones were not: compare the last ones."
    note = (
        f"Puzzles that {second.name} solves and {first.name} does not, and the reverse, with the p value of the exact "
        f"McNemar test, adjusted by Holm's method for {len(differences)} tests. Best models were chosen "
        f"{chosen}"
    )
    table = _table(["cell", first.name, second.name, "change", "verdict"], rows, kind="numbers")
    return _all([title, table, element("p", note, class_="soft")])


def _winner(difference: Change, p_value: float, first: str, second: str) -> str:
    if not significant(p_value):
        return NOT_SIGNIFICANT
    return f"{second if difference.gained > difference.lost else first} is better"


# Samples


def _samples(account: Account) -> Html:
    """The same puzzles before and after; without evaluations, completions of the first and the last step."""
    before, after = 0, account.best
    parts = []
    for cell, steps in account.cells.items():
        one, other = steps.get(before), steps.get(after or 0)
        if one and other and puzzles(one) == puzzles(other) != []:
            pairs = zip(one.examples, other.examples, strict=True)
            samples = [_pair(_side(before, first), _side(other.step, second)) for first, second in pairs]
            parts.append(
                _all([element("h4", cell), *samples])
                if steps is account.own
                else _folded(cell, *samples, kind="screen")
            )
    return _all(parts) if parts else _drawn(account.samples)


def _drawn(samples: Sequence[Example]) -> Html:
    if not samples:
        return Html("")
    ends = dict.fromkeys((samples[0].step, samples[-1].step))
    sides = [[_side(end, sample) for sample in samples if sample.step == end][:DRAWN] for end in ends]
    note = element("p", "From training, where every step has different puzzles.", class_="soft")
    return _all([note, *(_pair(*pair) for pair in zip_longest(*sides, fillvalue=Html("")))])


def _pair(*sides: Html) -> Html:
    return element("div", *sides, class_="pair")


def _side(step: int, example: Example) -> Html:
    right = example.reason == "correct"
    outcome = element("span", f"{'✓' if right else '✗'} {example.reason}", class_="good" if right else "bad")
    place = f"{f'step {step:,}' if step else 'start'} · {printable(example.title, limit=80)} · "
    title = element("p", place, outcome, f" · reward {example.reward}")
    completion = printable(example.completion.strip("\n"), keep_newlines=True, limit=EXCERPT_CHARACTERS)
    return element("div", title, element("pre", completion), class_="side")


# Failures


def _failures(account: Account) -> Html:
    parts = []
    for cell, steps in account.cells.items():
        evaluations = [(word, steps[step]) for word, step in account.stations if step in steps and steps[step].reasons]
        if evaluations:
            table = _reasons(evaluations)
            parts.append(_all([element("h4", cell), table]) if steps is account.own else _folded(cell, table))
    return _all(parts)


def _reasons(evaluations: Sequence[tuple[str, Evaluated]]) -> Html:
    """Completions by the reason of their score: correct ones first, then by frequency at the start."""
    totals = {reason: one.reasons[reason] for _, one in reversed(evaluations) for reason in one.reasons}
    order = sorted(totals, key=lambda reason: (reason != "correct", -totals[reason], reason))
    rows: list[list[object]] = [[reason, *(_bar(reason, one) for _, one in evaluations)] for reason in order]
    for name, label in (("lenient_accuracy", "right if read leniently"), ("format_rate", "both tag pairs")):
        shares = [getattr(one, name) for _, one in evaluations]
        rows.append([_small(label), *(_small("-" if share is None else percent(share)) for share in shares)])
    lengths = [one.mean_length for _, one in evaluations]
    rows.append([_small("mean tokens"), *(_small("-" if length is None else f"{length:.1f}") for length in lengths)])
    head = ["outcome", *(_all([word, _small(f"step {one.step:,}")]) for word, one in evaluations)]
    return _table(head, rows, kind="bars")


def _bar(reason: str, evaluation: Evaluated) -> Html:
    count, total = evaluation.reasons.get(reason, 0), sum(evaluation.reasons.values())
    kind = "bar good" if reason == "correct" else "bar bad"
    bar = element("i", style=f"width:{count / max(total, 1):.2%}")
    return _all([element("span", f"{count:,}"), element("span", bar, class_=kind, aria_hidden="true")])


# Health


def _health(account: Account) -> Html:
    """Metrics of the first and the last step, and warnings about the last steps."""
    history = [line for line in account.metrics if line["step"] > 0]
    rows = []
    for one in METRICS:
        points = [(int(line["step"]), line[one.name]) for line in history if one.in_report and one.name in line]
        if points:
            first, last = (one.show(points[end][1]) for end in (0, -1))
            rows.append([_all([one.label, _small(one.meaning)]), first, _sparkline(points), last])
    if not rows:
        return Html("")
    signs = collapses(history) | warnings(history)
    notes = [element("p", f"{sign[:1].upper()}{sign[1:]}.", class_="soft") for sign in signs.values()]
    return _all([_table(["", "first step", "", "last step"], rows, kind="numbers health"), *notes])


def _sparkline(points: Series) -> Html:
    """The values as a line from lowest to highest, 100 by 20."""
    low, high = min(value for _, value in points), max(value for _, value in points)
    start, end = points[0][0], points[-1][0]
    places = [
        (100 * (step - start) / max(end - start, 1), 19 - 18 * (value - low) / ((high - low) or 1))
        for step, value in points
    ]
    line = element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places))
    return element("svg", line, viewBox="0 0 100 20", preserveAspectRatio="none", class_="spark", aria_hidden="true")


# Configuration and environment


def _configuration(accounts: Sequence[Account], defaults: Mapping[str, object]) -> Html:
    """Settings that differ from the shipped defaults, then all settings."""
    if not accounts:
        return Html("")
    changed = [key for key in defaults if any(account.settings.get(key) != defaults[key] for account in accounts)]
    head = ["setting", *([account.name for account in accounts] if len(accounts) > 1 else ["value"]), "default", ""]

    def table(keys: Iterable[str]) -> Html:
        rows = [
            [
                element("code", *_breakable(key)),
                *(element("code", _shown(account.settings.get(key))) for account in accounts),
                element("code", _shown(defaults[key])),
                _small(FIELDS[key].description or ""),
            ]
            for key in keys
        ]
        return _table(head, rows, kind="facts")

    lead = element("p", "Settings that differ from the defaults:", class_="soft")
    return _all([lead, table(changed), _folded(f"all {len(defaults)} settings", table(defaults))])


def _breakable(key: str) -> Iterable[str]:
    """A key that may wrap after a dot or an underscore in a narrow column."""
    return (Html("<wbr>") if part == "" else part for part in re.split(r"(?<=[._])()", key))


def _environment(accounts: Sequence[Account]) -> Html:
    """Where each run was computed, and from which step."""
    places = [
        (f"{account.name}, {since}" if len(accounts) > 1 else since, facts)
        for account in accounts
        for since, facts in account.environment.items()
        if isinstance(facts, Mapping)
    ]
    if not places:
        return Html("")
    names = dict.fromkeys(name for _, facts in places for name in facts)
    rows = [[name, *(element("code", _shown(facts.get(name, "-"))) for _, facts in places)] for name in names]
    return _table(["", *(place for place, _ in places)], rows, kind="facts")


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
