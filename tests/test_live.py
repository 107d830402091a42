import io
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from grpo_cli.core.metrics import PHASES, TABLE
from grpo_cli.core.rl.observer import Validated
from grpo_cli.core.run.folder import Run
from grpo_cli.ui.live import TrainingView, fitting, group_line

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u200b\r[bold]markup[/bold]"
ESCAPED = r"\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u200b\r[bold]markup[/bold]"
ANSI = re.compile(r"\x1b\[\??[0-9;]*[A-Za-z]")
METRICS = {
    "reward": 0.4125, "accuracy": 0.344, "format_rate": 0.984, "kl": 0.00123, "loss": 0.01, "entropy": 0.612,
    "completion_length": 143.21, "truncated": 0.031, "zero_variance": 0.125, "clip_fraction": 0.0,
    "grad_norm": 0.8312, "weights_changed": 0.9998, "tokens_per_second": 4210.4, "mfu": 0.407,
    "time/rollout": 1.42, "time/score": 0.002, "time/reference": 0.21, "time/update": 0.68, "time/total": 2.31,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(width: int = 80, height: int = 40, **environment: str) -> Console:
    """A console that takes itself for a terminal, with these environment variables only."""
    return Console(
        file=Terminal(), width=width, height=height, force_terminal=True, _environ={"TERM": "xterm", **environment}
    )


def pipe() -> Console:
    return Console(file=io.StringIO(), _environ={})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def metrics(step: int, **changes: float) -> dict[str, float]:
    return {"step": step, **METRICS, **changes}


def sample(completion: str = "<think>\n4 * 7 - 3 = 25\n</think>") -> Mapping[str, object]:
    return {"numbers": [4, 7, 3], "target": 25, "completion": completion, "reward": 1.0, "reason": "correct"}


def picture(view: TrainingView, width: int = 80, height: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, _environ={})
    console.print(view)
    return written(console).splitlines()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# Piped


def test_a_pipe_gets_one_plain_line_for_each_step() -> None:
    console = pipe()
    with TrainingView(200, console=console) as view:
        view.message("preset builtin: no CUDA device was found")
        view.progress("sampling token", 3, 128)
        view.evaluated(Validated(0, 0.355, 327, (0.305, 0.408)))
        view.step(metrics(1), sample(HOSTILE))
    assert written(console) == (
        "preset builtin: no CUDA device was found\n"
        "step 0: val accuracy 35.5% of 327 puzzles (30.5 to 40.8%)\n"
        "step 1 of 200, -:--:-- left  reward 0.412  accuracy 34.4%  format 98.4%  kl 0.0012  entropy 0.612"
        "  length 143.2  truncated 3.1%  zero-var 12.5%  clip 0.0%  grad norm 0.831  changed 100.0%  tok/s 4,210"
        "  mfu 40.7%  s/step 2.31  rollout 1.42s  score 0.00s  reference 0.21s  update 0.68s\n"
    )


def a_group() -> list[dict[str, object]]:
    wrong = {"reason": "wrong_value", "reward": 0.2, "advantage": -0.2, "completion": "4 + 7 = 11. No.\nI give up."}
    right = {"reason": "correct", "reward": 1.0, "advantage": 0.6, "completion": "4 + 7 = 11. No.\n3 * 7 + 4 = 25"}
    return [wrong, right, wrong, {**wrong, "completion": HOSTILE}]


GROUP = "1 correct 1.00 (+0.60), 3 wrong value 0.20 (-0.20), part after "


def test_a_step_shows_a_whole_group_in_short() -> None:
    console = pipe()
    with TrainingView(200, console=console) as view:
        view.step(metrics(1), {**sample(), "group": a_group()[:3]})
    assert written(console).endswith(
        f"  group: {GROUP.replace('3', '2')}'4 + 7 = 11. No.\\n': '3 * 7 + 4 = 25' or 'I give up.'\n"
    )
    assert written(console).count("\n") == 1
    view = TrainingView(200, console=terminal(140))
    view.step(metrics(1), {**sample(), "group": a_group()})
    assert GROUP in "\n".join(picture(view, width=140))
    assert "\x1b" not in "\n".join(picture(view, width=140))


def test_a_group_of_equal_completions_has_no_first_difference() -> None:
    assert group_line({"group": a_group()[:1] * 8}) == "8 wrong value 0.20 (-0.20)"
    assert group_line(sample()) == ""
    ends = [{**a_group()[1], "completion": "ab"}, {**a_group()[0], "completion": "abc"}]
    assert group_line({"group": ends}).endswith("part after 'ab': '' or 'c'")


@pytest.mark.faults
def test_forced_colour_does_not_make_a_pipe_a_terminal() -> None:
    console = Console(file=io.StringIO(), _environ={"FORCE_COLOR": "1", "TERM": "xterm"})
    with TrainingView(200, console=console) as view:
        view.step(metrics(1), sample())
    assert "\x1b" not in written(console)
    assert written(console).count("\n") == 1


def test_a_pipe_hears_of_every_phase_over_two_seconds_and_then_now_and_again() -> None:
    console, clock = pipe(), Clock()
    view = TrainingView(40, console=console, clock=clock)
    for clock.now, token in [(100, 1), (101, 10), (103, 30), (110, 90), (119, 180)]:
        view.progress("evaluating, 0 of 64 puzzles done: token", token, 360)
    view.evaluated(Validated(0, 0.4, 64, (0.3, 0.5)))
    for clock.now, step in [(120, 1), (123, 2), (130, 3)]:
        view.progress(f"warm start: loss 0.{step}00, step", step, 12)
    for clock.now in (131, 140):  # a step says one line, unless it is slow
        view.progress("sampling token", 3, 360)
    place = "evaluating, 0 of 64 puzzles done: token"
    assert written(console).splitlines() == [
        f"{place} 30 of 360",
        f"{place} 180 of 360",
        "step 0: val accuracy 40.0% of 64 puzzles (30.0 to 50.0%)",
        "warm start: loss 0.200, step 2 of 12, 0:00:30 left",
    ]


# On a terminal


def test_before_the_first_step_the_picture_says_what_runs_and_has_no_empty_table() -> None:
    clock = Clock()
    view = TrainingView(40, console=pipe(), clock=clock)
    view.progress("evaluating, 0 of 64 puzzles done: token", 30, 360)
    lines = picture(view)
    assert lines[0].startswith("starting model ")
    assert lines[1] == "evaluating, 0 of 64 puzzles done: token 30 of 360"
    assert not any("reward" in line for line in lines)


def test_a_warm_start_has_a_bar_and_the_time_left() -> None:
    console, clock = terminal(), Clock()
    with TrainingView(40, console=console, clock=clock) as view:
        for clock.now, step in [(10, 1), (20, 2), (30, 3)]:
            view.progress("warm start: loss 0.312, step", step, 12)
        lines = picture(view)
        assert lines[0].startswith("warm start ") and "━" in lines[0]
        assert lines[0].endswith(" 25%  0:00:30 elapsed, 0:01:30 left")
        assert lines[1] == "warm start: loss 0.312, step 3 of 12, 0:01:30 left"
        view.begin(Run(Path("run")), 0)
        assert picture(view)[0].startswith("step 0 of 40")
    assert "warm start" in written(console)  # the display has begun


def test_the_time_left_of_a_warm_start_that_goes_on_counts_only_the_steps_seen() -> None:
    clock = Clock()
    view = TrainingView(40, console=pipe(), clock=clock)
    for clock.now, step, left in [(10, 22, "-:--:--"), (20, 23, "0:12:50"), (40, 24, "0:19:00")]:
        view.progress("warm start: loss 0.312, step", step, 100)
        assert picture(view)[1].endswith(f"step {step} of 100, {left} left")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (20, "step reward"),
        (40, "step reward accuracy format kl"),
        (80, "step reward accuracy format kl entropy length truncated s/step"),
        (140, " ".join(column.title for column in TABLE)),
    ],
)
def test_a_narrow_terminal_drops_the_least_important_columns(width: int, titles: str) -> None:
    chosen = fitting(width)
    assert " ".join(column.title for column in chosen) == titles


def test_every_metric_of_the_table_has_a_rank_of_its_own() -> None:
    assert sorted(column.rank for column in (*TABLE, *PHASES)) == list(range(len(TABLE) + len(PHASES)))


@pytest.mark.parametrize(("width", "height"), [(20, 10), (40, 24), (80, 24), (80, 40), (140, 50)])
def test_the_picture_fits_the_terminal(width: int, height: int) -> None:
    view = TrainingView(1200, console=pipe())
    view.evaluated(Validated(0, 0.0, 327, (0.0, 0.01)))
    for step in range(1181, 1201):
        view.step(metrics(step), sample("日本" * 500_000 + "\n<answer>4 * 7 - 3</answer>"))
    view.evaluated(Validated(1200, 1.0, 327, (0.988, 1.0)))
    view.progress("evaluating", 327, 327)
    lines = picture(view, width, height)
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width
    assert ("start 0.0%, step 1200 100.0% (98.8 to 100.0%), best 100.0%" in "\n".join(lines)) == (width >= 80)


def test_the_picture_shows_progress_steps_curves_and_a_sample() -> None:
    clock = Clock()
    view = TrainingView(200, console=pipe(), clock=clock)
    view.evaluated(Validated(0, 0.355, 327, (0.305, 0.408)))
    clock.now = 12
    view.step(metrics(99, reward=0.2), sample())
    clock.now = 16
    view.step(metrics(100, reward=0.6), sample())
    clock.now = 18
    view.evaluated(Validated(99, 0.7, 327, (0.5, 0.8), dev_accuracy=0.6))
    view.evaluated(Validated(100, 0.61, 327, (0.556, 0.661), dev_accuracy=0.5))
    view.progress("rollout", 96, 128)
    lines = picture(view)
    assert re.fullmatch(r"step 100 of 200 .*━ +50%  0:00:18 elapsed, 0:06:38 left", lines[0])
    assert lines[1:8] == [
        "rollout 96 of 128",
        " step  reward  accuracy  format       kl  entropy  length  truncated  s/step",
        "   99   0.200     34.4%   98.4%   0.0012    0.612   143.2       3.1%    2.31",
        "  100   0.600     34.4%   98.4%   0.0012    0.612   143.2       3.1%    2.31",
        "",
        "reward  ▁█          first ten 0.400, last ten 0.400",
        "val     ▁█▆         start 35.5%, step 100 61.0% (55.6 to 66.1%), best 70.0%",
    ]
    assert lines[8] == "time                rollout 1.42s  score 0.00s  reference 0.21s  update 0.68s"
    assert lines[9].startswith("╭─ [4, 7, 3] -> 25  reward 1.0, correct ─")
    assert [line.strip("│ ") for line in lines[10:13]] == ["<think>", "4 * 7 - 3 = 25", "</think>"]


def test_time_left_is_the_pace_of_the_steps_seen_and_counts_down() -> None:
    clock = Clock()
    view = TrainingView(110, console=pipe(), clock=clock)
    view.begin(Run(Path("run")), 100)
    assert picture(view)[0].endswith("-:--:-- left")
    for step, clock.now in [(101, 10), (102, 12), (103, 14)]:
        view.step(metrics(step), sample())
    assert picture(view)[0].endswith("0:00:14 left")
    clock.now = 15
    assert picture(view)[0].endswith("0:00:13 left")


@pytest.mark.faults
@pytest.mark.parametrize("no_colour", [False, True])
def test_a_terminal_gets_no_control_character_from_a_completion(no_colour: bool) -> None:
    console = terminal(NO_COLOR="1") if no_colour else terminal()
    with TrainingView(200, console=console) as view:
        view.begin(Run(Path("run")), 0)
        view.message(HOSTILE)
        view.step(metrics(1), sample(HOSTILE))
    shown = written(console)
    assert shown.count(ESCAPED) >= 2
    own = ANSI.sub("", shown)
    assert {character for character in own if not character.isprintable()} <= {"\n", "\r"}
    assert "\r[bold]" not in own
    assert bool(re.search(r"\x1b\[(\d+;)*3\d", shown)) != no_colour


def test_the_cursor_comes_back_when_training_is_interrupted() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), TrainingView(200, console=console) as view:
        view.begin(Run(Path("run")), 0)
        view.step(metrics(1), sample())
        raise KeyboardInterrupt
    shown = written(console)
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")
