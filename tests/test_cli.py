"""The commands as a user meets them: output, one-sentence errors, exit codes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command
from forked import Forked

import grpo_cli.cli.eval as eval_command
from grpo_cli.cli.models import ModelChoice, load
from grpo_cli.core.config import resolve as config
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.decode import ShrinkingSampler
from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.files import load_puzzles
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score


@pytest.mark.parametrize("purpose", [["--run", "one"], ["--dry-run"]])
def test_a_training_resolves_its_settings_and_builds_its_task_once(
    countdown: Command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purpose: list[str]
) -> None:
    """A reward of one's own says when its file is run."""
    name = f"own{len(purpose)}.py"
    (tmp_path / name).write_text("print('loaded')\ndef even(completion, puzzle):\n    return len(completion) % 2\n")
    resolved, resolve = list[object](), config.resolve

    def counted(**given: Any) -> config.Resolved:
        resolved.append(given)
        return resolve(**given)

    monkeypatch.setattr(config, "resolve", counted)
    result = countdown("train", "--model", tiny_folder, *SMALL, "--reward", f"{name}:even", *purpose)
    assert result.code == 0, result.err
    assert len(resolved) == 1
    assert (result.out + result.err).count("loaded") == 1


def test_gen_data_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys; sys.argv = ['countdown', 'gen-data', '--split', 'val']; from grpo_cli.cli.app import main\n"
    code += "try: main()\nfinally: print({'torch', 'transformers', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.rstrip().endswith("set()")
    assert len(found.stdout.splitlines()) == 327


COMPLETED = {
    "train --preset ": "auto builtin mine qwen2.5-0.5b qwen2.5-1.5b qwen2.5-1.5b-original smollm2-135m",
    "train --preset smol": "smollm2-135m",
    "train --run fi": "first",
    "train --model ": "builtin first",
    "eval ": "builtin first",
    "eval --suite ": "transfer hard",
    "train --eval-suite h": "hard",
    "plot --runs others ": "second",
    "runs --delete ": "first",
    "export ": "first",
    "train --loss-type d": "dapo dr_grpo",
    "train --config nowhere.toml --preset ": "",
    "train --batch-size four --model f": "first",
}
COMPLETE = """
import os, sys
from grpo_cli.cli.app import main
sys.argv = ["countdown"]
for line in LINES:
    os.environ |= {"COMP_WORDS": f"countdown {line}", "COMP_CWORD": str(len(line.split(" ")))}
    try: main()
    except SystemExit: print("", flush=True)
    finally: print("--", flush=True)
print({"torch", "transformers", "matplotlib"} & set(sys.modules))
"""


def test_names_that_exist_are_completed_without_torch(tmp_path: Path) -> None:
    for run in ("runs/first", "others/second"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").write_text("{}")
    settings = '[preset.mine.model]\nmodel = "builtin"\n[suite]\nhard = {"val 4 one-shot" = 1.0}\n'
    (tmp_path / "config.toml").write_text(settings)
    environ = {**os.environ, "_COUNTDOWN_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", f"LINES = {[*COMPLETED]!r}{COMPLETE}"]
    found = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    *shown, loaded = found.stdout.split("--\n")
    assert [text.split() for text in shown] == [names.split() for names in COMPLETED.values()]
    assert (loaded, found.stderr) == ("set()\n", "")


def test_every_command_is_listed_and_explains_itself_with_an_example(countdown: Command) -> None:
    listed = countdown("--help").out
    for command in ("gen-data", "train", "eval", "solve", "plot"):
        shown = countdown(command, "--help")
        assert f" {command} " in listed and shown.code == 0
        assert "Example: countdown" in " ".join(shown.out.split())


def test_gen_data_writes_the_same_bytes_for_the_same_arguments(countdown: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        arguments = ("--numbers", 4, "--count", 50, "--seed", 3, "--out", tmp_path / name)
        assert countdown("gen-data", *arguments).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len((tmp_path / "a").read_text().splitlines()) == 50


def test_train_leaves_a_complete_run_and_says_what_it_came_to(trained: Command, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "first"
    names = "config.json environment.json metrics.jsonl samples.jsonl summary.json training_curve.png kl_divergence.png"
    assert {*names.split(), "model", "checkpoints"} <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert {"base_accuracy", "final_accuracy", "best_accuracy"} <= summary.keys()


def test_train_says_first_which_preset_and_why(countdown: Command, tiny_folder: Path) -> None:
    found = countdown("train", "--model", tiny_folder, *SMALL)
    assert found.err.splitlines()[0].startswith("preset builtin: ")
    assert "CUDA" in found.err.splitlines()[0]
    assert "\x1b" not in found.err


def test_the_number_of_threads_is_said_and_can_be_set(countdown: Command, tiny_folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        done = countdown(
            "train", "--model", tiny_folder, "--num-iterations", 1, "--max-new-tokens", 4, "--eval-puzzles", 1,
            "--batch-size", 1, "--num-generations", 2, "--device", "cpu", "--threads", 2,
        )  # fmt: skip
        assert "device: CPU; threads: 2" in done.err
    finally:
        torch.set_num_threads(before)


def test_windows_is_refused_in_one_sentence() -> None:
    code = """
import signal, sys, typer, rich.console, rich.table, rich.progress, pydantic, tomli
from grpo_cli.ui import text
for name in ("fcntl", "resource", "pwd"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGHUP", "SIGPIPE"):
    delattr(signal, name)
sys.platform, sys.argv = "win32", ["countdown", "train"]
from grpo_cli.cli.app import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2, "error: `countdown` runs on Linux and macOS\n\nhint: on Windows, use it in WSL\n"
    )  # fmt: skip


def test_train_never_overwrites_a_run_unasked(trained: Command, tiny_folder: Path, tmp_path: Path) -> None:
    before = (tmp_path / "runs" / "first" / "metrics.jsonl").read_bytes()
    found = trained("train", "--model", tiny_folder, "--run", "first", *SMALL)
    assert found.code == 2
    assert "--resume" in found.err
    assert (tmp_path / "runs" / "first" / "metrics.jsonl").read_bytes() == before


def test_dry_run_shows_sources_and_a_prompt_and_trains_nothing(
    countdown: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTDOWN_TRAIN_SEED", "7")
    found = countdown("train", "--dry-run", "--batch-size", 3)
    shown = " ".join(found.out.split())
    assert found.code == 0
    assert "train.batch_size 3 flag --batch-size" in shown
    assert "train.seed 7 COUNTDOWN_TRAIN_SEED" in shown
    assert "fits: " in shown and "<|im_start|>" in shown and "train.learning_rate" not in shown
    found = countdown("train", "--dry-run", "--batch-size", 3, "-v")
    shown = " ".join(found.out.split())
    assert "a prompt of" in shown and "train.learning_rate" in shown and "memory in GB" in shown
    assert not (tmp_path / "runs").exists()


def test_probe_says_what_there_is_to_learn_and_leaves_nothing(
    countdown: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    found = countdown(
        "train", "--probe", "--model", tiny_folder, "--numbers", 2, "--style", "zero-shot", *SMALL, "--warm-start", 8
    )
    assert found.code == 0
    assert "as it is before the warm start" in found.err
    shown = " ".join(found.out.split())
    assert "32 train puzzles of 2 numbers, groups of 2" in shown
    assert all(f"{style} 32 0.0% (0.0 to 10.7%)" in shown for style in ("one-shot", "zero-shot", "natural"))
    assert "of the completions reach the token limit" in shown and "no completion was correct" in shown
    assert not (tmp_path / "runs").exists()


def test_eval_json_is_one_object_and_nothing_else(trained: Command) -> None:
    found = trained("eval", "first", "--json", "--limit", 3, "--max-new-tokens", 8)
    result = json.loads(found.out)
    assert (result["model"], result["count"], result["split"]) == ("first", 3, "val")


def test_eval_decodes_no_more_completions_at_once_than_the_batch_size(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    class Watched(ShrinkingSampler):
        def run(self) -> Iterator[int]:
            rows.append(self.rows)
            return super().run()

    flags = ["--limit", 1, "--samples", 5, "--temperature", 1, "--max-new-tokens", 4]
    whole = countdown("eval", tiny_folder, "--json", *flags).out
    monkeypatch.setattr("grpo_cli.core.rollout.local.ShrinkingSampler", Watched)
    assert countdown("eval", tiny_folder, "--json", *flags, "--batch-size", 2).out == whole
    assert rows[-3:] == [2, 2, 1]


def test_eval_of_several_models_compares_them_with_the_first(trained: Command, tiny_folder: Path) -> None:
    few = ["--limit", 2, "--max-new-tokens", 8]
    found = json.loads(trained("eval", "first", tiny_folder, "first", "--json", *few).out)
    assert [result["model"] for result in found["models"]] == ["first", str(tiny_folder), "first"]
    assert [(pair["first"], pair["second"]) for pair in found["paired"]] == [
        ("first", str(tiny_folder)),
        ("first", "first"),
    ]
    assert found["paired"][1] == {"first": "first", "second": "first", "gained": 0, "lost": 0, "p_value": 1.0}
    shown = trained("eval", "first", tiny_folder, *few).out
    assert "puzzles gained" in shown and "McNemar" in shown


def test_eval_out_writes_every_completion(trained: Command, tmp_path: Path) -> None:
    sampling = ["--limit", 2, "--samples", 3, "--temperature", 1, "--max-new-tokens", 8]
    found = trained("eval", "first", *sampling, "--out", tmp_path / "all.jsonl")
    assert found.code == 0
    assert "pass@3" in found.out
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert {"numbers", "target", "completion", "reward", "reason", "answer"} <= records[0].keys()


SUITE = '[suite.mine]\n"val 3 natural" = 1.0\n"train 4 zero-shot" = 3.0\n'


def test_a_suite_is_a_matrix_of_the_same_puzzles_for_all_models(
    trained: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(SUITE)
    asked = ("eval", "--suite", "mine", "first", tiny_folder, "--limit", 3, "--max-new-tokens", 8)
    found = json.loads(trained(*asked, "--json", "--out", tmp_path / "all.jsonl").out)
    names = ["val 3 natural", "train 4 zero-shot"]
    assert (found["suite"], list(found["weights"])) == ("mine", names)
    assert [model["model"] for model in found["models"]] == ["first", str(tiny_folder)]
    for model in found["models"]:
        assert [(cell["numbers"], cell["count"]) for cell in model["cells"]] == [(3, 3), (4, 3)]
        assert model["mean"] == (model["cells"][0]["accuracy"] + 3 * model["cells"][1]["accuracy"]) / 4
        assert model["seconds"] > 0
        assert all(cell["decoding"] == found["decoding"] for cell in model["cells"])
    assert [(pair["cell"], pair["second"]) for pair in found["paired"]] == [(name, str(tiny_folder)) for name in names]
    assert {"p_value", "p_holm", "gained", "lost"} <= found["paired"][0].keys()
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [record["cell"] for record in records] == [name for name in names for _ in range(3)] * 2
    puzzles = [(record["cell"], record["numbers"], record["target"]) for record in records]
    assert puzzles[:6] == puzzles[6:]
    shown = trained(*asked).out
    for text in ("weighted mean", found["protocol"], *names, "first -> "):
        assert text in shown


def test_markdown_is_tables_on_stdout(trained: Command, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(SUITE)
    for arguments in (["--suite", "mine"], []):
        shown = trained("eval", "first", "first", "--markdown", "--limit", 2, "--max-new-tokens", 8, *arguments)
        lines = shown.out.splitlines()
        tables = [line.count("|") for line in lines if line.startswith("|")]
        assert sorted(set(tables)) == ([5, 6] if arguments else [6, 9])
        assert "| --- | ---: |" in "".join(lines)


def test_every_evaluation_says_how_many_puzzles_its_model_was_trained_on(trained: Command, tmp_path: Path) -> None:
    samples = tmp_path / "runs/first/samples.jsonl"
    row = json.loads(samples.read_text().splitlines()[0])
    known = [([1, 2], 3), ([2, 1], 3), ([5, 4], 9)]  # the order of the numbers does not matter
    samples.write_text("".join(json.dumps({**row, "numbers": n, "target": t}) + "\n" for n, t in known))
    count = len(list(Countdown().problems("train", 2)))
    asked = ("eval", "first", "--numbers", 2, "--max-new-tokens", 1)
    assert json.loads(trained(*asked, "--json").out)["overlap"] == 0
    result = trained(*asked, "--split", "train")
    assert f"2 of {count} puzzles were trained on (compared with the 2 of first" in " ".join(result.out.split())
    assert f"warning: first was trained on puzzles of this evaluation: 2 of {count} train 2" in result.err
    assert "warning" not in trained(*asked).err


def test_several_models_are_evaluated_as_the_first_would_be(trained: Command, tiny_folder: Path) -> None:
    own = ("--precision", "float32", "--limit", 2)
    found = trained("eval", "builtin", "first", "--style", "natural", "--max-new-tokens", 9, "--json", *own)
    assert [result["decoding"]["max_new_tokens"] for result in json.loads(found.out)["models"]] == [9, 9]
    assert "all are evaluated" not in found.err
    trained("train", "--model", tiny_folder, "--run", "second", "--style", "natural", *SMALL)
    found = trained("eval", "first", "second", "--max-new-tokens", 9, "--json", *own)
    assert [result["style"] for result in json.loads(found.out)["models"]] == ["one-shot", "one-shot"]
    said = "all are evaluated with the settings of first; second has task.style natural, not one-shot"
    assert found.err.splitlines() == [said]


def test_every_model_of_a_run_is_evaluated_with_the_runs_settings(trained: Command, tiny_folder: Path) -> None:
    trained("train", "--model", tiny_folder, "--run", "second", "--style", "natural", *SMALL)
    checkpoint = next(Path("runs/second/checkpoints").glob("*/model"))
    for model in ("second", "runs/second/model", checkpoint):
        found = json.loads(trained("eval", model, "--max-new-tokens", 9, "--limit", 2, "--json").out)
        assert found["style"] == "natural"
    found = trained("eval", checkpoint, "--style", "zero-shot", "--max-new-tokens", 9, "--limit", 2, "--json")
    assert json.loads(found.out)["style"] == "zero-shot"


def test_solve_prints_the_answer_alone_on_stdout_and_its_code_is_the_verdict(countdown: Command) -> None:
    codes = set()
    for numbers, target in (((2, 4, 6), 12), ((4, 6, 8), 72)):
        found = countdown("solve", f"{' '.join(map(str, numbers))} = {target}", "--model", "builtin")
        correct = score(f"<answer>{found.out.strip()}</answer>", Puzzle(numbers, target)).correct
        assert found.code == (0 if correct else 1)
        assert ("correct" in found.err) == correct
        codes.add(found.code)
    assert 0 in codes


def test_attempts_to_solve_are_numbered(countdown: Command, tiny_folder: Path) -> None:
    found = countdown("solve", "4 7 3 = 25", "--model", tiny_folder, "--attempts", 2, "--max-new-tokens", 4)
    heads = [line for line in found.err.splitlines() if line.startswith("attempt ")]
    assert heads == ["attempt 1 of 2, greedy", "attempt 2 of 2, at temperature 1"]


def test_solve_json(countdown: Command) -> None:
    found = json.loads(
        countdown("solve", "Using the numbers [2, 4, 6], create an expression that equals 12.", "--json").out
    )
    assert found.keys() == {"numbers", "target", "answer", "correct", "reason", "attempts", "solutions"}
    assert (found["numbers"], found["target"]) == ([2, 4, 6], 12)


def test_a_puzzle_without_a_solution_is_told_before_a_model_loads(countdown: Command) -> None:
    found = countdown("solve", "2 2 2 = 99", "--model", "owner/name")
    assert found.code == 1
    assert "no solution" in found.err


def test_gen_data_writes_what_a_name_says_and_dash_is_stdout(countdown: Command, tmp_path: Path) -> None:
    for name in ("x.csv.gz", "x.xlsx", "x.TSV", "x.jsonl.zip"):
        found = countdown("gen-data", "--count", 5, "--out", name)
        assert (found.code, "end its name in `.jsonl`" in found.err) == (2, True)
    found = countdown("gen-data", "--count", 5, "--out", "-")
    assert len(found.out.splitlines()) == 5 and list(tmp_path.iterdir()) == []
    assert countdown("gen-data", "--count", 5, "--out", "X.CSV").code == 0
    assert (tmp_path / "X.CSV").read_text().startswith("numbers,target,")
    assert load_puzzles(tmp_path / "X.CSV").rows["train"]


def test_plot_draws_a_run_and_a_file_of_metrics(trained: Command, tmp_path: Path) -> None:
    shutil.copy("runs/first/metrics.jsonl", "old.jsonl")
    found = trained("plot", "first", "old.jsonl", "--smooth", "--window", 2, "--format", "svg")
    assert found.code == 0
    assert found.out.splitlines()[:2] == ["plots/first+old/training_curve.svg", "plots/first+old/kl_divergence.svg"]
    assert (tmp_path / "plots/first+old/training_curve.svg").read_text().startswith("<?xml")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--batchsize", "4"], "did you mean `--batch-size`?"),
        (["eval", "--eval-puzzles", "16"], "did you mean `--limit`?"),
        (["train", "--limit", "16"], "did you mean `--eval-puzzles`?"),
        (["eval", "--model", "first"], "give the name without `--model`; see `countdown eval --help`"),
        (["solve", "4 7 3 = 25", "--run", "first"], "did you mean `--model`?"),
        (["train", "--lr", "1"], "did you mean `--learning-rate`?"),
        (["train", "--max_new_tokens", "3"], "did you mean `--max-new-tokens`?"),
        (["train", "--dry-run", "--probe"], "`--dry-run` and `--probe` exclude each other"),
        (["train", "--probe", "--run", "x", "--seeds", "2"], "`--probe` trains nothing"),
        (["gen-data", "--task", "mine.py"], "see `countdown gen-data --help`"),
        (["train", "--use-all=false"], "hint: see `countdown train --help`"),
        (["export", "first", "x", "--gguf"], "hint: see `countdown export --help`"),
        (["eval", "--limit"], "hint: see `countdown eval --help`"),
        (["trian"], "Did you mean 'train'?"),
        (["export", "first"], "missing argument 'DIR'"),
        (["train", "--learning-rate", "nan"], "--learning-rate"),
        (["train", "--keep-last", "1"], "`--keep-last` must be a whole number of at least 2, not `1`"),
        (["train", "--num-generations", "1"], "`--num-generations` must be a whole number of at least 2 and at most"),
        (["train", "--run", "x", "--step", "3"], "say `--run NAME --resume --step STEP`"),
        (["train", "--run", "x", "--resume", "--probe"], "leave out `--resume`"),
        (["train", "--preset", "bultin"], "builtin"),
        (["train", "--model", "./nowhere"], "./nowhere"),
        (["train", "--run", "../x"], "../x"),
        (["train", "--run", "none", "--resume"], "no run"),
        (["train", "--resume"], "--run"),
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--device", "cuda"], "not available"),
        (["eval", "--style", "haiku"], "one-shot"),
        (["eval", "owner/name", "--suite", "transfr"], "did you mean `transfer`?"),
        (["eval", "owner/name", "--suite", "transfer", "--numbers", "4"], "`--numbers` is set by the cells"),
        (["eval", "owner/name", "--json", "--markdown"], "exclude each other"),
        (["eval", "builtin", "--samples", "8"], "set `--temperature 1` too"),
        (["solve", "what is love"], "4 7 3 = 25"),
        (["plot"], "countdown train"),
        (["solve", "-1 2 = 3"], "a puzzle has positive numbers"),
        (["gen-data", "--out", "mine"], "--overwrite"),
        (["plot", "nothing.json"], "countdown runs`, or name a file of metrics"),
        (["plot", "nothing.json", "--report"], "hint: list runs with `countdown runs`\n"),
        (["gen-data", "--split", "dev"], "'--split': 'dev' is not one of 'train', 'val'"),
        (["gen-data", "--min-target", "100", "--max-number", "2", "--out", "runs"], "these rules allow no puzzle"),
        (["gen-data", "--numbers", "5"], "--count"),
        (["gen-data", "--out", "no/such/folder/x.jsonl"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    countdown: Command, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "mine").write_text("kept")
    found = countdown(*arguments)
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, tiny_folder: Path, number: signal.Signals, code: int
) -> None:
    arguments = ["train", "--model", tiny_folder, "--run", "long", *SMALL, "--num-iterations", "100000"]
    process = Forked(tmp_path, *arguments)
    process.read_until("step 3 ")
    process.send(number)
    ended, rest = process.ended()
    assert ended == code
    assert "countdown train --run long --resume" in " ".join(rest.split())
    assert list((tmp_path / "runs" / "long" / "checkpoints").glob("step-*"))


@pytest.mark.faults
def test_ctrl_c_elsewhere_is_exit_code_130(countdown: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.task.data.generate", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    found = countdown("gen-data", "--count", 5)
    assert found.code == 130
    assert "Traceback" not in found.err


def test_a_model_is_freed_before_the_next_is_evaluated(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Policy]] = []

    def load_alone(chosen: ModelChoice) -> Policy:
        assert not any(policy() for policy in loaded)
        policy = load(chosen)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(eval_command, "load", load_alone)
    assert countdown("eval", tiny_folder, tiny_folder, "--limit", 2, "--max-new-tokens", 2).code == 0
    assert len(loaded) == 2


MIXED: list[dict[str, object]] = [
    {"numbers": [3, 5, 2], "target": 13}, {"numbers": [2, 4, 6], "target": 20}, {"nums": [1, 2, 3, 4], "target": 10}
]  # fmt: skip


def puzzle_file(folder: Path, rows: Sequence[dict[str, object]]) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    load_puzzles.cache_clear()
    return path


def test_eval_evaluates_all_puzzles_of_a_file(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    few = ["--json", "--max-new-tokens", 4, "--puzzles"]
    done = countdown("eval", tiny_folder, *few, puzzle_file(tmp_path, MIXED))
    assert (json.loads(done.out)["count"], json.loads(done.out)["numbers"]) == (3, 0)
    odd = countdown("eval", tiny_folder, *few, puzzle_file(tmp_path, [{**MIXED[0], "split": "train"}]))
    assert (json.loads(odd.out)["count"], json.loads(odd.out)["numbers"]) == (1, 3)
    marked = countdown("eval", tiny_folder, *few, puzzle_file(tmp_path, [MIXED[0], {**MIXED[1], "split": "val"}]))
    assert json.loads(marked.out)["count"] == 1
    train = countdown("eval", tiny_folder, *few, puzzle_file(tmp_path, MIXED * 3), "--split", "train")
    assert json.loads(train.out)["split"] == "train"


def test_a_suite_has_a_files_puzzles_of_each_size(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[suite.s]\n"val 3 natural" = 1.0\n"val 4 natural" = 1.0\n')
    rows = [{"numbers": [2, 4, 6], "target": 20}, {"numbers": [2, 4, 6, 8], "target": 20}]
    asked = ["eval", tiny_folder, "--suite", "s", "--max-new-tokens", 4, "--json", "--out", "out.jsonl", "--puzzles"]
    done = countdown(*asked, puzzle_file(tmp_path, rows))
    assert done.code == 0, done.err
    cells = json.loads(done.out)["models"][0]["cells"]
    assert [(cell["numbers"], cell["count"]) for cell in cells] == [(3, 1), (4, 1)]
    assert [json.loads(line)["cell"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        "val 3 natural", "val 4 natural"
    ]  # fmt: skip
    none = countdown(*asked, puzzle_file(tmp_path, rows[:1]), "--overwrite")
    assert none.code == 2 and "there are no puzzles for the cell `val 4 natural`" in none.err


def test_a_suite_evaluates_a_task_in_each_cell(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[suite.s]\n"val 3 natural" = 1.0\n"train 4 one-shot" = 1.0\n')
    (tmp_path / "echo.py").write_text(
        "def problems(split): return [split]\ndef prompt(x): return x\ndef score(text, x): return 0.0\n"
    )
    asked = ["eval", tiny_folder, "--suite", "s", "--max-new-tokens", 4, "--task", "echo.py", "--out", "out.jsonl"]
    done = countdown(*asked)
    assert done.code == 0, done.err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("question", "given", "added", "answer"),
    [
        ("3 3 8 8 = 24", [], ["--operations", "+-*/"], "8 / (3 - 8 / 3)"),
        ("25 75 4 = 100", [], ["--no-use-all"], "4 * 25"),
        ("8 2 50 = 4", ["--operations", "+"], ["--operations", "+*/", "--no-use-all"], "8 / 2"),
    ],
)
def test_a_puzzle_without_a_solution_names_the_rules_that_have_one(
    countdown: Command, question: str, given: list[str], added: list[str], answer: str
) -> None:
    """The hint works when it is typed."""
    found = countdown("solve", question, *given)
    hint = found.err.partition("hint: ")[2].strip()
    assert found.code == 1 and " has no solution with " in found.err and hint.startswith(f"{answer} with "), found.err
    typed = shlex.split(hint.partition(" with ")[2].replace("`", "").replace(" and ", " "))
    assert typed == added
    flags = {**dict(zip(given[::2], given[1::2], strict=True))} if "--operations" not in typed else {}
    asked = [part for pair in flags.items() for part in pair] + typed
    again = countdown("solve", question, *asked, "--max-new-tokens", 4, "--show-solution", "--json")
    assert answer in json.loads(again.out)["solutions"]
