"""`countdown study`: its statistics by hand, its file, and its trainings, stopped and resumed."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Command, main

from grpo_cli.cli import seeds
from grpo_cli.core.evals.statistics import paired, student, student_quantile
from grpo_cli.core.evals.study import compare, detectable, read_study
from grpo_cli.core.rl.labs import BUGS

TINY = """
[study]
seeds = 2

[model]
model = "{model}"
precision = "float32"

[train]
batch_size = 2
num_generations = 2
max_new_tokens = 8
num_iterations = 2
eval_every = 2
eval_puzzles = 2
save_every = 1

[conditions.baseline]

[conditions.fast.train]
learning_rate = 1e-3
"""


@pytest.mark.parametrize(
    ("t", "freedom", "p_value"),
    [
        (1.0, 1, 0.5),
        (12.7062, 1, 0.05),
        (4.30265, 2, 0.05),
        (2.77645, 4, 0.05),
        (4.60409, 4, 0.01),
        (1.97993, 120, 0.05),
    ],
)
def test_p_values_of_student_are_those_of_printed_tables(t: float, freedom: int, p_value: float) -> None:
    assert student(t, freedom) == pytest.approx(p_value, abs=2e-5)
    assert student(-t, freedom) == student(t, freedom)
    assert student_quantile(p_value, freedom) == pytest.approx(t, rel=1e-3)


def test_paired_differences_by_hand() -> None:
    """Mean 0.02, deviation 0.01, error 0.01 / sqrt 3 = 0.0057735: t = 3.4641; half width 4.30265 * 0.0057735."""
    (low, high), p_value = paired([0.01, 0.02, 0.03])
    assert (low, high) == pytest.approx((-0.0048414, 0.0448414), abs=1e-6)
    assert p_value == pytest.approx(1 - 3.4641016 / math.sqrt(2 + 12), abs=1e-6)  # two degrees: 1 - t / sqrt(2 + t^2)
    assert paired([0.1, 0.1]) == ((0.1, 0.1), 0.0) and paired([0.0, 0.0])[1] == 1.0


def test_what_a_design_can_show_by_hand() -> None:
    """Five seeds, one comparison: (2.77645 + 0.94096) * 2 / sqrt 5 = 3.325 points; more comparisons need more."""
    assert detectable(5, 1, 0.02) == pytest.approx(0.03325, abs=1e-5)
    assert detectable(5, 10, 0.02) > detectable(5, 1, 0.02) > detectable(20, 1, 0.02)


def test_a_difference_must_hold_over_seeds_and_over_puzzles() -> None:
    base = ["0" * 40, "0" * 40, "0" * 40]
    better, worse, same, baseline = "1" * 30 + "0" * 10, "1" * 2 + "0" * 38, "0" * 40, "0" * 40
    rows = compare(
        {
            "base": base,
            "all seeds": [better, better[:-1] + "1", better],
            "one seed": [better, baseline, same],
            "two puzzles": [worse, worse, worse],
        }
    )
    assert [row.verdict for row in rows] == ["can't be told", "better", "can't be told", "can't be told"]
    assert rows[1].difference == pytest.approx((30 + 31 + 30) / 120) and rows[0].difference == 0
    assert rows[3].p_value == pytest.approx(2 * paired([1, 1, *[0] * 38])[1])  # sure over seeds, not over puzzles; Holm
    mirrored = compare({"base": [better] * 3, "other": [better[:-1] + "1", *base[1:]]})
    assert mirrored[1].difference < 0


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[train]\nbatch_size = 2", "has no two conditions"),
        ("[conditions.one]", "has no two conditions"),
        ("[train]\nbatchsize = 2", "unknown setting `train.batchsize` in `s.toml`"),
        ("[study]\nseeds = 1", "`study.seeds` in `s.toml`: input should be greater"),
        ("[conditions]\none = 1\ntwo = 2", "`conditions.one` in `s.toml` must be a table"),
        ('[conditions."a b"]\n[conditions.c]', "`a b` in `s.toml` cannot name a condition"),
        ("[study]\nseeds = 1\n[conditions.a]\n[conditions.b]", "`study.seeds` in `s.toml`: input should be greater"),
        ("[study]\nsteps = 1\n[conditions.a]\n[conditions.b]", "`study.steps` in `s.toml`: extra inputs"),
        ("[conditions.a]\n[conditions.b.loss]\nbetta = 1", "unknown setting `conditions.b.loss.betta` in `s.toml`"),
        ("[conditions.a]\n[conditions.b.train]\nseed = 1", "sets `train.seed`"),
        ("[conditions.a]\n[conditions.b.loss]\nbeta = 'x'", "condition `b` of `s.toml`: `--beta` must be"),
        ("[conditions.a]\n[conditions.b.suite.x]\n'val 3 natural' = 1", "cannot be set here"),
        ("[preset.builtin.train]\nseed = 1\n[conditions.a]\n[conditions.b]", "`preset.builtin` in `s.toml` cannot be"),
        ("conditions = 1", "has no two conditions"),
        ("[eval]\nlimit = 3\n[conditions.a]\n[conditions.b]", "`s.toml` sets `eval.limit`, which no training has"),
        ("[conditions.a]\n[conditions.b.train]\nnum_iterations = 9", "train for 8 and 9 steps"),
        ("[conditions.a]\n[conditions.b.model]\nmodel = '/none'", "condition `b` of `s.toml`: no model at `/none`"),
        ("[conditions.a]\n[conditions.b.model]\nref_model = '/none'", "condition `b` of `s.toml`: no model at `/none`"),
        (
            "[conditions.a]\n[conditions.b.train]\nwarm_start = 8\nwarm_start_impatient = 9",
            "condition `b` of `s.toml`: `warm_start_impatient` must be at most `warm_start`",
        ),
        ("[study]\nfirst_seed = 4294967295\n[conditions.a]\n[conditions.b]", "`study.first_seed` in `s.toml`"),
        ("[conditions.a]\n[conditions.b.loss]\nbeta = 0.001", "conditions `a` and `b` of `s.toml` are the same"),
        ("[study", "is not valid TOML"),
    ],
)
def test_a_study_file_is_checked_before_any_training(countdown: Command, text: str, error: str) -> None:
    Path("s.toml").write_text(text)
    found = countdown("study", "s.toml")
    assert found.code == 2 and error in found.err, found.err
    assert not Path("runs").exists()


def test_the_example_files_are_studies() -> None:
    examples = Path(__file__).parent.parent / "examples"
    assert {own.get("train.broken", "none") for own in read_study(examples / "labs.toml").conditions.values()} == {
        "none",
        *BUGS,
    }
    study = read_study(examples / "study.toml")
    assert len(study.conditions) == 14 and study.conditions["grpo"]["train.num_iterations"] == 4


Lines = list[Sequence[str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> tuple[Lines, list[int]]:
    """Trains in this process; keeps the command lines. The number in the list is how many of them are run."""
    lines, allowed = Lines(), [100]

    def run(due: Sequence[Sequence[str]], at_once: int, *, quiet: bool, ended: Callable[[int], None]) -> int:
        for place, line in enumerate(due):
            if not allowed[0]:
                return 130
            allowed[0] -= 1
            lines.append(line)
            assert main(*line) == 0
            ended(place)
        return 0

    monkeypatch.setattr(seeds, "_run", run)
    return lines, allowed


def test_a_study_that_was_stopped_goes_on_where_it_was(
    countdown: Command, tiny_folder: Path, tmp_path: Path, here: tuple[Lines, list[int]]
) -> None:
    lines, allowed = here
    Path("tiny.toml").write_text(TINY.format(model=tiny_folder))
    planned = countdown("study", "tiny.toml", "--dry-run")
    assert planned.code == 0 and "each by one step of `tiny-baseline-0`" in planned.err
    assert [line[-1] for line in lines] == ["0"] and not Path("runs").exists()
    lines.clear()
    allowed[0] = 4
    stopped = countdown("study", "tiny.toml")
    assert stopped.code == 130 and "4 trainings, 0 finished, 4 to do" in stopped.err
    del lines[0]
    assert "the same command goes on from here" in stopped.err
    (tmp_path / "runs" / "tiny-fast-0" / "summary.json").unlink()  # stopped in the middle
    allowed[0] = 100
    resumed = countdown("study", "tiny.toml", "--html", "page.html")
    assert resumed.code == 0 and "4 trainings, 2 finished, 2 to do" in resumed.err
    assert lines[3][-1] == "--resume" and lines[4][-4:] == ["--run", "tiny-fast-1", "--seed", "1"]
    assert "--learning-rate=0.001" in lines[4] and "can't be told" in resumed.out
    page = Path("page.html").read_text()
    assert (
        "<svg" in page
        and "train.learning_rate = 0.001" in page
        and "http:" not in page.replace("http://www.w3.org", "")
    )

    text = TINY.format(model=tiny_folder)  # runs with other settings, and a step that was not evaluated, are refused
    Path("tiny.toml").write_text(text.replace("1e-3", "1e-2"))
    other = countdown("study", "tiny.toml")
    assert other.code == 2 and "run `tiny-fast-0` has another `train.learning_rate`" in other.err
    Path("tiny.toml").write_text(text.replace("seeds = 2", "seeds = 2\nstep = 1"))
    early = countdown("study", "tiny.toml")
    assert early.code == 2 and "`baseline` is not evaluated after step 1, but every 2 steps" in early.err


@pytest.mark.slow
def test_resumed_and_whole_studies_end_with_the_same_result_and_a_failure_shows_its_output(
    countdown: Command, tiny_folder: Path
) -> None:
    Path("tiny.toml").write_text(TINY.format(model=tiny_folder))
    found = countdown("study", "tiny.toml", "--jobs", 2)
    assert found.code == 0 and "4 of 4 finished" in found.err and "can't be told" in found.out
    shutil.rmtree("runs/tiny-baseline-0")
    Path("runs/tiny-fast-0/summary.json").unlink()
    results = [json.loads(countdown("study", "tiny.toml", "--json", *more).out) for more in ([], ["--runs", "others"])]
    assert all(result.pop("seconds") > 0 and len(result["curves"]["fast"]) == 2 for result in results)
    assert results[0] == results[1]
    Path("runs/tiny-fast-1/summary.json").unlink()
    shutil.rmtree("runs/tiny-fast-1/checkpoints")
    Path("runs/tiny-fast-1/checkpoints").touch()
    failed = countdown("study", "tiny.toml", "--jobs", 2)
    assert failed.code not in (0, 130) and "is not a folder" in failed.err
