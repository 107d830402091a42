"""Hints are commands that work when typed."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, Command

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.rl.state import choose_checkpoint, require_origin
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.plugin import load_reward

REWARD = "def reward(completion, problem):\n    return len(completion) % 7 / 10\n"


def test_a_run_elsewhere_is_resumed_by_the_commands_in_its_messages(
    countdown: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    """In another folder of runs, with a space in its name; with a reward file."""
    (tmp_path / "reward.py").write_text(REWARD)
    flags = ["--runs", "my runs", "--reward", "reward.py:reward", "--num-iterations", 1]
    assert countdown("train", "--model", tiny_folder, "--run", "first", *SMALL, *flags).code == 0
    run = Run(Path("my runs/first"))
    resume = shlex.split(run.resume_command)[1:]
    assert resume == ["train", "--run", "first", "--runs", "my runs", "--resume"]

    more = countdown(*resume, "--num-iterations", 3)
    assert more.code == 0, more.err

    refused = countdown("train", "--run", "frist", "--runs", "my runs", "--resume")
    assert "did you mean `first`?" in refused.err and "`countdown train --run frist --runs 'my runs'`" in refused.err
    listed = countdown("export", "other", "x", "--runs", "my runs").err
    assert countdown(*shlex.split(re.findall("`(countdown runs .*?)`", listed)[0])[1:]).code == 0

    (tmp_path / "reward.py").write_text(f"{REWARD}#")
    load_reward.cache_clear()  # as another process
    refused = countdown(*resume, "--num-iterations", 4)
    assert "did not start from these files: other reward file" in " ".join(refused.err.split())


def test_a_checkpoint_s_folder_names_the_model_in_it(trained: Command) -> None:
    refused = trained("eval", "runs/first/checkpoints/step-2", "--limit", 1)
    assert refused.code == 2 and "hint: name `runs/first/checkpoints/step-2/model`" in refused.err
    assert trained("eval", "runs/first/checkpoints/step-2/model", "--limit", 1, "--max-new-tokens", 8).code == 0
    assert "or a run" in trained("eval", "runs/first/checkpoints", "--limit", 1).err


def test_a_question_in_a_hint_has_no_comma(trained: Command) -> None:
    assert (
        "hint: did you mean `first`? or train one with `countdown train --run firs`"
        in trained("export", "firs", "x").err
    )


def test_a_finished_run_whose_model_is_gone_is_not_to_be_resumed(trained: Command, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs" / "first" / "model")
    refused = trained("eval", "first", "--limit", 1)
    folder = re.search("`(runs/first/checkpoints/step-.*/model)`", refused.err)
    assert refused.code == 2 and folder and "--resume" not in refused.err
    assert trained("eval", folder[1], "--limit", 1, "--max-new-tokens", 8).code == 0
    assert "checkpoints/step-" in trained("export", "first", "x").err


@pytest.mark.parametrize("name", ["builtin", "none", "smollm2-135m"])
def test_a_name_that_no_run_can_have_is_not_to_be_trained(name: str, countdown: Command) -> None:
    refused = countdown("export", name, "x")
    assert refused.code == 2 and "countdown train" not in refused.err
    assert "hint: list runs with `countdown runs`" in refused.err


def test_a_run_without_checkpoints_offers_none(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "first")
    with pytest.raises(CountdownError) as caught:
        choose_checkpoint(run, None, 3, print)  # type: ignore[arg-type]
    assert caught.value.hint == "leave out `--step`"


def test_puzzles_that_changed_are_not_blamed_on_the_model(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "first")
    run.write_origin({"puzzles file": "a", "train problems": "a"})
    with pytest.raises(CountdownError, match="did not start from these puzzles: other puzzles file and train problems"):
        require_origin(run, {"puzzles file": "b", "train problems": "b"}, model="builtin", reference="same")
