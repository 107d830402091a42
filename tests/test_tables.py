import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.compare import Paired, SuitePaired
from grpo_cli.core.evals.contamination import Known
from grpo_cli.core.evals.evaluate import Completion, Evaluation, SuiteResult
from grpo_cli.core.rl.probe import Probe, Sampled
from grpo_cli.core.task.data import Summary
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score
from grpo_cli.ui import eval_tables
from grpo_cli.ui import tables as display
from grpo_cli.ui import text as terminal
from grpo_cli.ui.figures import Curves
from grpo_cli.ui.live import TrainingView

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u2066\u200b\r\x00\x7f[bold]markup[/bold]:smile:"
ESCAPED = r"\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u2066\u200b\r\x00\x7f[bold]markup[/bold]:smile:"
STYLE_CODES = re.compile(r"\x1b\[[0-9;]*m")
PUZZLE = Puzzle((4, 7, 3), 25)
RIGHT, WRONG = "<answer>4 * 7 - 3</answer>", "<answer>4</answer>"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.out, "width", 80)
    monkeypatch.setattr(terminal.err, "width", 80)


def unprintable(text: str) -> set[str]:
    return {character for character in text if not character.isprintable()} - {"\n"}


def pair(answer: str) -> tuple[Completion, Completion]:
    texts = (f"<answer>{answer}</answer>", "<think></think><answer>4 * 7 - 3</answer>")
    one, other = (Completion(PUZZLE, text, len(text), False, score(text, PUZZLE)) for text in texts)
    return one, other


def evaluation(*texts: str, model: str = "builtin") -> Evaluation:
    completions = [[Completion(PUZZLE, text, len(text), False, score(text, PUZZLE))] for text in texts]
    return Evaluation(model, "val", "one-shot", 3, 1, 0.0, 160, 0, completions)


def suite_result(*texts: str, model: str = "builtin", seen: bool = False) -> SuiteResult:
    """A suite of two cells, the second not in the mean."""
    known = Known({model: frozenset({PUZZLE.key})} if seen else {}, unknown=None if seen else model)
    first = replace(evaluation(*texts, model=model), known=known)
    cells = [first, replace(first, numbers=4, style="zero-shot")]
    return SuiteResult(model, cells, {cells[0].cell: 1.0, cells[1].cell: 0.0}, 12.34)


# Text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 * 7 - 3", "4 * 7 - 3"),
        ("größer × 日本 😀", "größer × 日本 😀"),
        ("[bold]x[/]", "[bold]x[/]"),
        (r"a \x1b backslash", r"a \x1b backslash"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202eabc\u2069", r"\u202eabc\u2069"),
        ("a\u200b\u200d\u2060\ufeffb", r"a\u200b\u200d\u2060\ufeffb"),
        ("\U000e0041", r"\U000e0041"),
        ("a\u3164\ufe0f", r"a\u3164\ufe0f"),
        ("over\rwrite\b\t", r"over\rwrite\x08\t"),
        ("two\nlines\u2028three", r"two\nlines\u2028three"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_acts_on_a_terminal_shows_as_its_code(text: str, expected: str) -> None:
    assert terminal.printable(text) == expected


def test_newlines_stay_only_where_asked_for() -> None:
    assert terminal.printable("a\nb\r\n", keep_newlines=True) == "a\nb\\r\n"


@pytest.mark.faults
def test_no_control_or_format_character_gets_through_unseen() -> None:
    everything = "".join(map(chr, [*range(0x10000), *range(0xE0000, 0xE0200)]))
    assert terminal.printable(everything).isprintable()


def test_long_text_is_cut_in_the_middle_and_counted() -> None:
    assert terminal.printable("a" * 500_000 + "b" * 500_000, limit=6) == "aaa … 999,994 characters … bbb"
    assert terminal.printable("abcdef", limit=6) == "abcdef"


def test_an_excerpt_keeps_the_first_and_last_lines() -> None:
    text = "\n".join(map(str, range(1, 21)))
    assert terminal.excerpt(text, width=10, lines=6).plain.split("\n") == ["1", "2", "…", "18", "19", "20"]
    assert terminal.excerpt("a\nb", width=10, lines=6).plain == "a\nb"


@pytest.mark.faults
def test_an_excerpt_of_one_endless_line_is_no_larger_than_asked_for() -> None:
    shown = terminal.excerpt("日" * 1_000_000, width=20, lines=5).plain.split("\n")
    assert len(shown) == 5
    assert max(map(cell_len, shown)) == 20


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 0], 8, "█▁"),
        ([0, 2, 6, 8], 2, "▁█"),
        ([1, 3, 9, 9, 0, 0], 3, "▃█▁"),
        ([5, 5, 5], 3, "▄▄▄"),
        ([float("nan"), 1, float("inf"), 2], 9, "▁█"),
        ([], 5, ""),
        ([1, 2], 0, ""),
    ],
)
def test_a_sparkline_scales_from_lowest_to_highest(values: list[float], width: int, expected: str) -> None:
    assert terminal.sparkline(values, width) == expected


# Streams


def test_an_error_is_on_stderr_with_its_hint_after_a_blank_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.error(CountdownError("no checkpoint in `runs/first`", "list runs with `ls runs`"))
    out, err = capsys.readouterr()
    assert out == ""
    assert STYLE_CODES.sub("", err) == "error: no checkpoint in `runs/first`\n\nhint: list runs with `ls runs`\n"


def test_ten_solutions_are_shown_and_the_rest_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    display.solutions(PUZZLE, [f"{number} + 1" for number in range(1_234)])
    lines = STYLE_CODES.sub("", capsys.readouterr().err).splitlines()
    assert lines[1:] == [*(f"  {number} + 1" for number in range(10)), "  ... and 1,224 more"]


def test_only_the_answer_of_a_solved_puzzle_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    text = display.reasoning(iter(["<think>4 * 7", " - 3</think>\n<answer>", "4 * 7 - 3</answer>"]))
    outcome = score(text, PUZZLE)
    display.answer(outcome.answer or "")
    display.verdict(PUZZLE, outcome)
    display.solutions(PUZZLE, ["3 * 7 + 4"])
    out, err = capsys.readouterr()
    assert text == "<think>4 * 7 - 3</think>\n<answer>4 * 7 - 3</answer>"
    assert STYLE_CODES.sub("", out) == "4 * 7 - 3\n"
    assert STYLE_CODES.sub("", err) == (
        f"{text}\ncorrect: 4 * 7 - 3 = 25\nsolutions of [4, 7, 3] -> 25:\n  3 * 7 + 4\n"
    )


def test_a_wrong_answer_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    display.verdict(PUZZLE, score("<answer>4 + 7 + 3</answer>", PUZZLE))
    assert STYLE_CODES.sub("", capsys.readouterr().err) == "wrong: the answer does not make the target\n"


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.json_object({"answer": HOSTILE})
    out = capsys.readouterr().out
    assert unprintable(out) == set()
    assert out.count("\n") == 1
    assert json.loads(out) == {"answer": HOSTILE}


def test_a_narrow_encoding_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    terminal.prepare_streams()
    display.answer("4 × 7 − 3")
    assert written.getvalue() == rb"4 \xd7 7 \u2212 3" + b"\n"


@pytest.mark.faults
@pytest.mark.parametrize(
    "show",
    [
        terminal.note,
        display.answer,
        lambda text: display.reasoning([text]),
        lambda text: terminal.error(CountdownError(text, text)),
        lambda text: display.prompt_tokens([(1, text)]),
        lambda text: eval_tables.evaluation(evaluation(text, model=text)),
        lambda text: eval_tables.comparison([suite_result("", model=text)]),
        lambda text: eval_tables.suite("s", [suite_result("", model=text)]),
        lambda text: eval_tables.suite_paired(SuitePaired(text, text, {"c": Paired(text, text, [pair(text)], [])})),
        lambda text: eval_tables.leaks([suite_result("", model=text, seen=True)]),
        lambda text: eval_tables.paired(Paired(text, text, [pair(text)], [])),
        lambda text: display.sparklines([Curves(text, [(1, 0.5)], [], [], [(1, 0.5)])]),
        lambda text: TrainingView(9).message(text),
    ],
)
def test_untrusted_text_shows_escaped_and_unstyled(
    show: Callable[[str], object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.out, "width", 200)
    show(HOSTILE)
    shown = STYLE_CODES.sub("", "".join(capsys.readouterr()))
    assert unprintable(shown) == set()
    assert ESCAPED in shown


# Tables


def test_a_summary_is_data_unless_the_puzzles_are(capsys: pytest.CaptureFixture[str]) -> None:
    summary = Summary(2506, 2179, 327, 1, 24.5, 100, 0)
    display.gen_data_summary(summary, Path("puzzles.jsonl"))
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split() for line in STYLE_CODES.sub("", out).splitlines()] == [
        ["2,506", "puzzles", "written", "to", "puzzles.jsonl"],
        ["split", "2,179", "train,", "327", "val"],
        ["target", "1", "to", "100,", "median", "24.5"],
        ["duplicates", "0"],
    ]
    display.gen_data_summary(summary, None)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2,179 train, 327 val" in err


def test_the_configuration_shows_every_setting_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = resolve(flags={"train.seed": 7})
    display.config_table(resolved)
    lines = STYLE_CODES.sub("", capsys.readouterr().out).splitlines()
    rows = {line.split()[0]: line.rstrip().split(maxsplit=2)[1:] for line in lines[2:]}
    assert (rows["train.seed"], rows["task.style"]) == (["7", "flag --seed"], ['"one-shot"', "config.toml"])
    assert set(rows) == set(resolved.sources)


def test_an_evaluation_shows_rates_outcomes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = "<think>a</think><answer>4 * 7 - 3</answer>", "<think>b</think><answer>4 + 7 + 3</answer>"
    result = evaluation(right, wrong, wrong, "<think>c")
    eval_tables.evaluation(result)
    shown = STYLE_CODES.sub("", capsys.readouterr().out)
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert rows[:7] == [
        "builtin 4 val puzzles of 3 numbers, one-shot, greedy",
        "accuracy 25.0% (95% interval 4.6 to 69.9%)",
        "lenient accuracy 25.0%",
        "format 75.0%",
        "mean length 33.5 tokens",
        f"decoding up to 160 tokens, protocol {result.protocol}",
        "",
    ]
    for row in (
        "correct 1 25.0% █████",
        "wrong_value 2 50.0% ██████████",
    ):
        assert row in rows
    titles = [line for line in shown.splitlines() if line.startswith("[4, 7, 3]")]
    assert titles == [
        "[4, 7, 3] -> 25  reward 0.2, wrong_value",
        "[4, 7, 3] -> 25  reward 1.0, correct",
        "[4, 7, 3] -> 25  reward 0.0, no_answer",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_tables_fit_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.out, "width", width)
    results = [suite_result(RIGHT, "A", model=name * 30) for name in "abc"]
    eval_tables.comparison(results)
    eval_tables.suite("s", results)
    eval_tables.suite_paired(SuitePaired("a" * 30, "b" * 30, {"train 4 zero-shot": Paired("a", "b", [pair("A")], [])}))
    eval_tables.evaluation(evaluation(RIGHT, "A" * 1_000_000 + "<answer>four</answer>"))
    display.config_table(resolve())
    shown = STYLE_CODES.sub("", capsys.readouterr().out)
    assert max(map(cell_len, shown.splitlines())) <= width
    assert shown.count("AAAA\n") <= 12 and "not_an_expression" in shown


SURE = {"count": 327, "start": 0.4, "step": 10, "accuracy": 0.9, "kept": 0.85, "last": 0.6}
SURE |= {"gained": 2, "lost": 30, "p_value": 1e-6}
UNSURE = {**SURE, "gained": 3, "lost": 6, "p_value": 0.508}
SUMMARY = {
    "puzzles": 327, "base_accuracy": 0.355, "final_accuracy": 0.817, "final_interval": [0.771, 0.855],
    "best_accuracy": 0.823, "best_dev_accuracy": 0.85, "best_step": 180, "bad_steps": 0, "steps": 200,
    "seconds": {"training": 300.0, "evaluation": 100.0, "suite": 75.0}, "seconds_after_best": 190.4,
    "peaks": {"val 3 one-shot": SURE},
}  # fmt: skip


def summarized(capsys: pytest.CaptureFixture[str], folder: str = "runs/first", **changes: object) -> list[str]:
    """The lines of a training's summary, and those that say what to do next."""
    terminal.out.width = 100  # until the fixture restores it
    display.training_summary({**SUMMARY, **changes}, Path(folder), overlap="0 of 327 puzzles", change="It improved.")
    printed = capsys.readouterr()
    return [" ".join(line.split()) for line in STYLE_CODES.sub("", printed.out + printed.err).splitlines()]


def test_the_summary_of_a_training_compares_base_and_final_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert summarized(capsys) == [
        "val accuracy on 327 puzzles, greedy",
        "base 35.5%",
        "final 81.7% (95% interval 77.1 to 85.5%)",
        "best 82.3%, after step 180, the best on dev (85.0%), saved as the run's model",
        "change It improved.",
        "time 400 s, 25.0% of it in evaluations",
        "overlap 0 of 327 puzzles",
        "run runs/first",
        'next: countdown solve "4 6 10 = 64" --model first',
        "next: countdown why first",
        "next: countdown plot first --report",
    ]
    phases = {"decode": {"seconds": 200.0, "share": 0.5}}
    more = summarized(capsys, "/elsewhere/first", bad_steps=2, phases=phases, broken="kl", warm_start=True)
    assert "base 35.5%, after the warm start" in more and "decode 200.0 50.0%" in more
    assert "skipped 2 steps whose loss or gradient was not finite" in more
    assert "broken a bug is planted on purpose: `--break kl`" in more
    assert "next: countdown why first --runs /elsewhere" in more


def test_the_summary_of_a_suite_says_when_each_cell_peaked(capsys: pytest.CaptureFixture[str]) -> None:
    """Dev cells chose the best step, so they are not tested."""
    peaks = {"val 3 one-shot": SURE, "val 4 natural": UNSURE, "dev 3 one-shot": {**SURE, "p_value": None}}
    shown = summarized(capsys, peaks=peaks)
    assert "cell n start peak step 180 step 200 change Holm p" in shown
    assert "val 3 one-shot 327 40.0% 90.0% at 10 85.0% 60.0% +2 -30 < 0.001" in shown
    assert "dev 3 one-shot 327 40.0% 90.0% at 10 85.0% 60.0% +2 -30 -" in shown
    assert "later steps took 190 s after step 180; change: start to best (exact McNemar)" in " ".join(shown)
    assert "the last step is the best" in " ".join(summarized(capsys, peaks=peaks, best_step=200))


def test_a_comparison_never_calls_a_difference_that_chance_makes(capsys: pytest.CaptureFixture[str]) -> None:
    eval_tables.paired(Paired("a", "b", [pair("4 + 7")] * 6, []))
    eval_tables.paired(Paired("a", "b", [pair("4 + 7")] * 5, []))
    sure, unsure = capsys.readouterr().out.strip().split("\n\n")
    assert [line.rstrip() for line in sure.splitlines()] == [
        "a -> b  6 puzzles gained, 0 lost, exact McNemar p = 0.031",
        "  gained: [4, 7, 3] -> 25  4 + 7 (wrong_numbers) -> 4 * 7 - 3 (correct)",
    ]
    shown = " ".join(unsure.split())
    assert "5 puzzles gained, 0 lost, exact McNemar p = 0.062: not significant" in shown


def test_a_suite_is_a_matrix_of_cells_by_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.out, "width", 120)
    results = [suite_result(RIGHT, WRONG), *(suite_result(RIGHT, RIGHT, model=name) for name in ("x", "y"))]
    eval_tables.suite("mine", results)
    rows = [" ".join(line.split()) for line in STYLE_CODES.sub("", capsys.readouterr().out).splitlines()]
    assert rows[0] == "suite mine 2 cells, 1 of them in the weighted mean"
    assert "val 3 one-shot 2 50.0% (9.5 to 90.5%) 100.0% (34.2 to 100.0%) 100.0% (34.2 to 100.0%)" in rows
    assert "weighted mean 50.0% 100.0% 100.0%" in rows
    assert f"decoded alike: greedy, up to 160 tokens, protocol {results[0].protocol}" in rows
    assert "x: 12.3 s; what x was trained on is not known" in rows


def test_a_suites_comparison_calls_no_difference_that_does_not_hold_for_all_its_cells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gained = {"val 3 one-shot": 8, "val 3 natural": 6, "train 3 natural": 0}
    cells = {name: Paired("a", "b", [pair("4 + 7")] * count, []) for name, count in gained.items()}
    eval_tables.suite_paired(SuitePaired("a", "b", cells))
    rows = [" ".join(line.split()) for line in STYLE_CODES.sub("", capsys.readouterr().out).splitlines()]
    assert "val 3 one-shot 8 0 0.023" in rows  # 3 * 2 / 2**8
    assert "val 3 natural 6 0 0.062 not significant" in rows  # 2 * 2 / 2**6
    assert "train 3 natural 0 0 1.000 not significant" in rows
    assert rows[-1] == "gained: [4, 7, 3] -> 25 4 + 7 (wrong_numbers) -> 4 * 7 - 3 (correct)"


def test_markdown_is_escaped_and_never_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    results = [suite_result(RIGHT, WRONG, model="a"), suite_result(RIGHT, model="b_|" * 40)]
    eval_tables.markdown("mine", results, [SuitePaired("a", "b", {"val 3 one-shot": Paired("a", "b", [], [])})])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:7] == [
        "| cell | puzzles | a | " + r"b\_\|" * 40 + " |",
        "| --- | ---: | ---: | ---: |",
        "| val 3 one-shot | 2 | 50.0% (9.5 to 90.5%) | 100.0% (20.7 to 100.0%) |",
        "| val 4 zero-shot | 2 | 50.0% (9.5 to 90.5%) | 100.0% (20.7 to 100.0%) |",
        "| weighted mean |  | 50.0% | 100.0% |",
    ]
    assert lines[-1] == "| val 3 one-shot | 0 | 0 | 1.000 | not significant |"


def test_a_model_that_was_trained_on_what_it_is_asked_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    eval_tables.leaks([suite_result(RIGHT, model="new"), suite_result(RIGHT, model="old", seen=True)])
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "warning: old was trained on puzzles of this evaluation: 1 of 1 val 3, 1 of 1 val 4\n"


def test_cheats_are_shown_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    honest, cheat = ("<think>x</think><answer>" + answer + "</answer>" for answer in ("4 * 7 - 3", "20 + 5"))
    eval_tables.evaluation(evaluation(honest, honest, honest, cheat))
    assert re.search("cheats +25.0%  reach the target with numbers reused", capsys.readouterr().out)
    eval_tables.evaluation(evaluation(honest))
    assert "cheats" not in capsys.readouterr().out


def test_a_probe_fits_eighty_columns_and_says_what_it_cost(capsys: pytest.CaptureFixture[str]) -> None:
    one = Sampled("one-shot", 2, [2, 1, 0, 0], [False, True, False, False], 1.0, 0.5, 100.0, 800, 2.5)
    other = Sampled("zero-shot", 2, [0] * 4, [False] * 4, 0.0, 0.0, 10.0, 80, 0.5)
    display.probe(Probe("one-shot", 3, {"one-shot": one, "zero-shot": other}))
    shown = STYLE_CODES.sub("", capsys.readouterr().out)
    table, _, findings = shown.partition("  cost ")
    assert all(cell_len(line.rstrip()) <= 80 for line in table.splitlines())
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "4 train puzzles of 3 numbers, groups of 2" in rows
    assert "one-shot 4 37.5% (9.2 to 78.1%) 100.0% 25.0% 50.0% 100.0" in rows
    assert "cost 3.0 seconds, 880 tokens" in rows
    assert "in 1 of 4 one-shot groups" in findings and "50% of the completions reach the token limit" in findings
