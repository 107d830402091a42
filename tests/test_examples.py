"""The examples run as they stand."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import SMALL, Command

from grpo_cli.core.task.puzzle import Puzzle

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_file_to_read_is_short_and_trains() -> None:
    assert len((EXAMPLES / "minimal_train.py").read_text().splitlines()) <= 150
    curve = example("minimal_train").train(steps=1, prompts=2, held_out=1)
    assert len(curve) == 1 and all(0 <= reward <= 1 for reward in curve)


def test_a_short_right_answer_earns_more_than_a_long_one(countdown: Command, tiny_folder: Path) -> None:
    short = example("reward").short
    puzzle, right = Puzzle((3, 5, 2), 13), "<think>a</think><answer>5 * 2 + 3</answer>"
    assert short("nothing", puzzle) == 0
    assert 1 < short(right.replace(">a<", f">{'a' * 300}<"), puzzle) < short(right, puzzle) <= 1.2
    result = countdown("train", "--model", tiny_folder, *SMALL, "--reward", f"{EXAMPLES / 'reward.py'}:short")
    assert result.code == 0, result.err


def test_the_notebook_runs_cell_by_cell(
    tiny_folder: Path, tmp_path: Path, countdown: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    cells = json.loads((EXAMPLES / "hosted.ipynb").read_text("utf-8"))["cells"]
    assert len(cells) == 10
    shown: list[str] = []
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(Image=shown.append))
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("!countdown "):
            line = shlex.split(source.removeprefix("!countdown "))
            if line[0] == "train":
                line += [*SMALL, "--model", str(tiny_folder)]
            done = countdown(*line)
            assert done.code == 0 or line[0] == "solve", done.err
        elif cell["cell_type"] == "code" and not source.startswith("%pip"):
            exec(source, {})
    assert Path(shown[0]).is_file() and (tmp_path / "my-model" / "first-f16.gguf").is_file()


@pytest.mark.slow
def test_the_notebook_takes_one_step_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The loss is 0 and the gradient is not; better completions become more likely, worse ones less."""
    cells = json.loads((EXAMPLES / "one_step.ipynb").read_text("utf-8"))["cells"]
    assert len(cells) <= 12
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert abs(names["loss"].item()) < 1e-6 < names["norm"].item()
    assert bool(((names["changed"] > 0) == (names["A"] > 0)).all())
    chances = {side: way["probability"] for side, way in names["sides"].items()}
    assert chances["better"]["after"] > chances["better"]["before"]
    assert chances["worse"]["after"] < chances["worse"]["before"]
    names["figure"].savefig(tmp_path / "fork.png")
    assert "wrong_value" in capsys.readouterr().out
