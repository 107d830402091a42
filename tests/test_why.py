"""`countdown why` as a user meets it: the step, the group, the completion, the page, and wrong lines."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command, default_loss
from rich.console import Console

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.rl.health import diagnose
from grpo_cli.ui import why as view

SCRIPT = "<script>alert(1)</script>\x1b[31m"
STAGES = {"sampled": "when sampled", "after": "after the step", "last": "step 40"}


def a_loss(*, beta: float = 0.0, kl_estimator: str = "k3") -> Loss:
    return default_loss(loss_type="dapo", beta=beta, kl_estimator=kl_estimator, scale_rewards="none")


def test_a_step_is_explained_down_to_its_tokens(trained: Command) -> None:
    found = trained("why", "first", "--step", 2, "--sample", 1, "--losses", "--html", "page.html")
    assert found.code == 0, found.err
    assert "replaying from the checkpoint of step 1: 1 step, which took" in found.err
    title = "step 2 of run first, replayed from the checkpoint of step 1: equal to the log bit for bit"
    assert " ".join(found.out.split()).startswith(title)
    for line in ("1. ", "2. The loss is ", "3. ", "sample 1, token by token", "logged loss: ", "as trained"):
        assert line in found.out
    page = Path("page.html").read_text()
    assert "token by token" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    again = trained("why", "first", "--step", 2, "--json")
    assert again.code == 0 and "replaying" not in again.err  # the run keeps the replay
    data = json.loads(again.out)
    assert data["replayed"] == data["logged"] and len(data["completions"]) == 2
    assert data["loss"] == pytest.approx(data["logged"]["loss"], abs=1e-6)


def test_every_completion_of_a_group_can_be_asked_for(trained: Command) -> None:
    for prompt, sample in ((0, 0), (1, 1)):
        found = trained("why", "first", "--step", 1, "--prompt", prompt, "--sample", sample, "--json")
        data = json.loads(found.out)
        assert (data["prompt"], data["sample"]) == (prompt, sample)
        assert len(data["tokens"]) == data["completions"][sample]["length"]


def test_a_run_without_a_step_is_diagnosed(trained: Command) -> None:
    found = trained("why")
    assert found.code == 0, found.err
    assert "had equal rewards, and so no gradient" in found.out and "docs/" in found.out
    names = [one["name"] for one in json.loads(trained("why", "first", "--json").out)["findings"]]
    assert {"gradient", "progress", "loss", "limit", "entropy"} <= set(names)


WRONG = [
    (["nothing", "--step", "1"], "no run `nothing`", "train one with"),
    (["first", "--step", "9"], "run `first` has no step 9", "choose one from 1 to 2"),
    (["first", "--prompt", "0"], "`--prompt` shows a part of one step", "countdown why first --step 1"),
    (["first", "--losses"], "`--losses` shows a part of one step", "--step 1"),
    (["first", "--step", "1", "--prompt", "2"], "a step has no `--prompt 2`", "choose one from 0 to 1"),
    (["first", "--step", "1", "--sample", "7"], "a step has no `--sample 7`", "choose one from 0 to 1"),
    (["first", "--step", "1", "--html", "no/page.html"], "`no` is not a folder", "create it"),
    (["first", "--step", "1", "--html", "page.png"], "would not be a file of the format", "in `.html`"),
    (["first", "--step", "0"], "invalid value for '--step'", "why --help"),
    (["first", "--step", "1", "--sample", "-1"], "invalid value for '--sample'", "why --help"),
]


@pytest.mark.parametrize(("line", "message", "hint"), WRONG)
def test_a_wrong_line_is_one_sentence_before_anything_loads(
    trained: Command, monkeypatch: pytest.MonkeyPatch, line: list[str], message: str, hint: str
) -> None:
    monkeypatch.setattr("grpo_cli.core.rl.replay.replay", lambda *_, **__: pytest.fail("loaded a model"))
    found = trained("why", *line)
    assert found.code == 2
    assert message in found.err and hint in found.err
    assert "Traceback" not in found.err


def test_a_page_is_not_overwritten_silently(trained: Command) -> None:
    Path("page.html").write_text("mine")
    assert trained("why", "first", "--step", 1, "--html", "page.html").code == 2
    assert Path("page.html").read_text() == "mine"


def a_step() -> dict[str, Any]:
    """What `explained` returns, with text that must not act on a terminal or a page."""
    row = {
        "reason": "wrong_value", "verdict": SCRIPT, "reward": 0.2, "parts": {}, "advantage": -0.25, "length": 70,
        "truncated": False, "text": SCRIPT, "gradient_share": 0.1, "loss": 0.01, "before": -12.5, "after": -13.0,
    }  # fmt: skip
    branch = {"continues": SCRIPT, "samples": [0, 1], "probability": {"sampled": 0.8, "after": 0.7, "last": 0.0}}
    token = {
        "token": SCRIPT, "sampled": -0.2, "reference": -0.2, "after": -0.3, "ratio": 1.0, "clipped": True, "kl": 0.0,
        "factor": 0.5, "loss": -1e-4, "gradient_share": 0.01,
    }  # fmt: skip
    return {
        "run": "one", "step": 2, "start": 0, "last_step": 40, "difference": 0.0,
        "sentences": ["One.", SCRIPT, "Three."],
        "prompt": 3, "problem": SCRIPT, "completions": [{"sample": 0, **row}, {"sample": 1, **row}], "sample": 0,
        "fork": {"token": 73, "before": SCRIPT, "stages": STAGES, "better": branch, "worse": branch},
        "tokens": [token] * 3, "formula": [SCRIPT], "losses": [{"name": "as trained", "cosine": 1.0, "norm": 0.5}],
    }  # fmt: skip


@pytest.mark.parametrize("width", [80, 140])
def test_a_step_fits_the_terminal_and_nothing_acts_on_it(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    console = Console(width=width, record=True, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(view, "out", console)
    view.show(a_step())
    shown = console.export_text()
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert "0.800" in shown and "step 40" in shown


def test_a_page_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    view.write_page(a_step(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert not re.search(r"(src|href)=", page)


def test_tokens_without_a_gradient_are_one_row() -> None:
    token = {"sampled": -0.5, "reference": None, "after": -0.25, "ratio": 2.0, "clipped": False, "kl": 0.0, "loss": 0.5}
    token["factor"] = 1.0
    shares = [0.0, 0.0004, 0.9, 0.0, 0.5, 0.5, *[0.0] * 9]
    rows = view.folded([{**token, "token": f"t{share}", "gradient_share": share} for share in shares])
    assert [row["place"] for row in rows] == ["0-1", "2", "3", "4", "5", "6-14"]
    assert (rows[0]["sampled"], rows[0]["ratio"], rows[0]["loss"], rows[0]["reference"]) == (-1.0, 4.0, 1.0, None)
    assert (rows[0]["token"], rows[-1]["token"]) == ("…0004", "…t0.0")
    assert sum(row["gradient_share"] for row in rows) == pytest.approx(sum(shares))


def steps(count: int, **metrics: tuple[float, float]) -> list[dict[str, float]]:
    """Metrics that go from a first value to a last one in even steps."""
    return [
        {"step": step, **{key: low + (high - low) * step / count for key, (low, high) in metrics.items()}}
        for step in range(1, count + 1)
    ]


DIAGNOSES = [
    ("format", {"format_rate": (1.0, 1.0), "accuracy": (0.0, 0.0)}, {}, "only the format"),
    ("trap", {"format_rate": (0.0, 1.0), "accuracy": (0.0, 0.0)}, {}, "the task was not"),
    ("moved", {"weights_changed": (0.02, 0.02), "zero_variance": (0.1, 0.1)}, {}, "bf16-master"),
    ("truncated", {"truncated": (0.6, 0.6)}, {}, "--max-new-tokens"),
    ("right", {"zero_variance": (1.0, 1.0), "accuracy": (1.0, 1.0)}, {}, "nothing is left to learn"),
    ("search", {"behaviour/tries": (4.0, 8.0), "behaviour/gave_up": (0.7, 0.2)}, {}, "gave up 61% -> 28%"),
    (
        "gave_up",
        {"behaviour/tries": (4.0, 1.5), "behaviour/gave_up": (0.6, 0.9), "accuracy": (0.3, 0.2)},
        {},
        "going on does not pay",
    ),
    ("sign", {}, {"beta": 0.1, "kl_estimator": "original"}, "k3"),
]


@pytest.mark.parametrize(("name", "metrics", "loss", "words"), DIAGNOSES)
def test_what_is_wrong_with_a_run_is_said(
    name: str, metrics: dict[str, tuple[float, float]], loss: dict[str, Any], words: str
) -> None:
    found = {one["name"]: one for one in diagnose(steps(60, **metrics), a_loss(**loss))}
    assert words in found[name]["text"]
    for one in found.values():
        assert (Path(__file__).parent.parent / one["page"]).is_file(), one


def test_a_short_run_is_judged_by_its_halves() -> None:
    lines = steps(5, truncated=(1.0, 1.0), zero_variance=(1.0, 1.0), accuracy=(0.0, 0.0), format_rate=(0.0, 0.0))
    assert [one["name"] for one in diagnose(lines, a_loss())] == ["truncated", "gradient"]
    assert [one["name"] for one in diagnose(lines[:1], a_loss())] == ["truncated", "gradient"]


def test_the_accuracies_of_a_run_are_those_of_its_last_evaluation() -> None:
    shares = [(0.2, 0.1), (0.6, 0.5), (0.9, 0.7)]
    lines = [{**line, "step": 2.0} for line in steps(6, reward=(0.1, 0.2))]
    for line, (dev, val) in zip(lines[1::2], shares, strict=True):
        line |= {"dev_accuracy": dev, "val_accuracy": val}
    found = {one["name"]: one["text"] for one in diagnose([*lines, lines[0]], a_loss())}
    assert "dev accuracy 90%" in found["selection"] and "val accuracy 70%" in found["selection"]


def test_a_sound_run_has_findings_and_no_advice() -> None:
    sound = {"accuracy": (0.3, 0.6), "format_rate": (0.9, 1.0), "zero_variance": (0.3, 0.3), "grad_norm": (0.1, 0.1)}
    sound |= {"weights_changed": (0.9, 0.9), "entropy": (0.5, 0.3), "completion_length": (90, 99), "loss": (0.1, 0.1)}
    sound |= {"reward": (0.4, 0.7), "truncated": (0.0, 0.1), "kl": (0.0, 0.01), "reward_margin": (0.8, 0.8)}
    found = diagnose(steps(60, **sound), a_loss())
    assert [one["name"] for one in found] == ["gradient", "progress", "loss", "limit", "entropy", "kl"]
    assert not any("--" in one["text"] for one in found)


@pytest.mark.parametrize(
    ("beta", "kl", "words"),
    [(0.1, 0.02, "only the pull of the KL term"), (0.1, 0.0, "nothing is learned"), (0.0, 0.02, "nothing is learned")],
)
def test_groups_of_equal_rewards_are_pulled_by_a_kl_above_0_alone(beta: float, kl: float, words: str) -> None:
    """In step 1 the policy is the reference: the KL and its gradient are 0."""
    groups = [SimpleNamespace(learns=False)] * 2
    replay: Any = SimpleNamespace(groups=groups, loss=a_loss(beta=beta), logged={"kl": kl}, completions=[])
    assert words in view._gradient_sentence(replay)


@pytest.mark.parametrize(
    ("updates", "words"), [([], "the weights stay as they were"), ([object()], "moved log-probabilities by 0.5")]
)
def test_a_step_without_a_gradient_moves_nothing(updates: list[object], words: str) -> None:
    """What the sampler's and the trainer's log-probabilities differ by is no change."""
    group, rows = SimpleNamespace(fork=None, change=0.5), [SimpleNamespace(updates=updates)]
    replay: Any = SimpleNamespace(groups=[group], instructive=0, completions=rows)
    assert words in view._change_sentence(replay)
