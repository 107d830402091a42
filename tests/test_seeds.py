"""`train --seeds`: one run per seed, kept, resumed or refused; their summary."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import SMALL, Command, main

from grpo_cli.cli import seeds
from grpo_cli.cli.seeds import Job, with_seed, words
from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.evals.statistics import bootstrap
from grpo_cli.core.run.folder import Run

FEW = [*SMALL, "--eval-every", "2", "--save-every", "2"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Trains in this process, and keeps the command lines."""
    lines = list[Sequence[str]]()

    def run(due: Sequence[Sequence[str]], at_once: int, *, quiet: bool, ended: Callable[[int], None]) -> int:
        lines.extend(due)
        return max(main(*arguments) for arguments in due)

    monkeypatch.setattr(seeds, "_run", run)
    return lines


def test_seeds_are_runs_of_their_own_which_are_kept_resumed_and_summed_up(
    countdown: Command, tiny_folder: Path, tmp_path: Path, here: list[Sequence[str]]
) -> None:
    given = ["train", "--model", tiny_folder, "--run", "two", "--seeds", 2, "--seed=3", *FEW]
    first = countdown(*given)
    assert first.code == 0, first.err
    assert [line[-4:] for line in here] == [["--run", f"two-{seed}", "--seed", str(seed)] for seed in (3, 4)]
    assert "best: " in first.out and "by bootstrap over seeds" in first.out
    assert "countdown plot two-3 two-4" in first.err
    configs = [json.loads((tmp_path / "runs" / f"two-{seed}" / "config.json").read_text()) for seed in (3, 4)]
    assert [config["train"].pop("seed") for config in configs] == [3, 4] and configs[0] == configs[1]

    (tmp_path / "runs" / "two-4" / "summary.json").unlink()
    again = countdown(*given)
    assert again.code == 0 and "run two-3 is finished" in again.err
    assert here[2:] == [["train", "--runs", "runs", "--run", "two-4", "--resume"]]

    other = countdown(*given, "--learning-rate", "1e-3")
    assert (other.code, len(here)) == (2, 3) and "run `two-3` has another `train.learning_rate`" in other.err

    longer = countdown(*given, "--num-iterations", 4)
    assert longer.code == 0 and "finished" not in longer.err
    assert [line[-2:] for line in here[3:]] == [["--resume", "--num-iterations=4"]] * 2
    assert [Run(tmp_path / "runs" / f"two-{seed}").metrics()[-1]["step"] for seed in (3, 4)] == [4, 4]
    shorter = countdown(*given)
    assert shorter.code == 2 and "run `two-3` has 4 steps, more than 2" in shorter.err


def test_a_run_is_started_resumed_or_replaced(tmp_path: Path) -> None:
    settings, run = with_seed(resolve().settings, 7), Run(tmp_path / "two-7")
    job = Job(run, settings, words(settings, {"loss.beta": "0.1", "train.seed": 1}, Path("my.toml")))
    start = ["train", "--config", "my.toml", "--runs", "runs", "--beta=0.1", "--run", "two-7", "--seed", "7"]
    assert job.line(overwrite=False) == start
    run.path.mkdir()
    run.write_config(settings.model_dump())
    assert job.line(overwrite=False) == ["train", "--runs", str(tmp_path), "--run", "two-7", "--resume"]
    assert job.line(overwrite=True) == [*start[:6], "--overwrite", *start[6:]]


def test_seeds_beyond_the_largest_are_refused_before_any_training(countdown: Command) -> None:
    found = countdown("train", "--run", "many", "--seeds", 2, "--seed", 2**32 - 1, "--dry-run")
    assert found.code == 2 and "2 seeds from 4294967295 on go beyond" in found.err


def test_seeds_need_a_name_and_no_resume(countdown: Command) -> None:
    for given in ([], ["--run", "one", "--resume"]):
        found = countdown("train", "--seeds", 2, *given)
        assert found.code == 2 and "`--seeds` needs `--run NAME`" in found.err


def test_a_failed_seed_ends_all_and_says_how_to_go_on(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "_run", lambda *_, **__: 130)
    found = countdown("train", "--model", tiny_folder, "--run", "two", "--seeds", 2)
    assert found.code == 130 and "the same command goes on from here" in found.err


def test_the_bootstrap_of_equal_values_is_that_value_and_of_others_lies_between() -> None:
    assert bootstrap([0.5, 0.5, 0.5]) == (0.5, 0.5)
    low, high = bootstrap([0.90, 0.92, 0.94, 0.96, 0.98])
    assert 0.90 < low < 0.93 and 0.95 < high < 0.98


@pytest.mark.slow
def test_each_seed_is_trained_in_a_process_of_its_own(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    given = ["train", "--model", tiny_folder, "--run", "two", "--seeds", 2, *FEW]
    assert countdown(*given).code == 0
    assert (tmp_path / "runs" / "two-0" / "summary.json").is_file()
    assert (tmp_path / "runs" / "two-1" / "summary.json").is_file()
