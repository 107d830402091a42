"""`countdown export` and `countdown runs`: the folder, the model card, the upload, the list."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from conftest import SMALL, Command
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo_cli.cli import artifacts
from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.config.settings import values
from grpo_cli.core.model.load import BUILTIN, load
from grpo_cli.core.run.logs import Evaluated
from grpo_cli.core.task.plugin import load_task
from grpo_cli.ui.card import model_card


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """What was uploaded to the hub: files by repository."""
    uploaded: dict[str, dict[str, bytes]] = {}

    def upload(_: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        uploaded[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, exist_ok: f"https://huggingface.co/{name}")
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return uploaded


PUSH = ("export", "first", "shared", "--push", "me/first", "--overwrite")


def test_a_new_best_model_has_its_card_before_the_training_ends(
    countdown: Command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards: list[str] = []
    card = tmp_path / "runs" / "first" / "model" / "README.md"
    monkeypatch.setattr(artifacts, "draw", lambda *_: cards.append(card.read_text("utf-8")))
    assert countdown("train", "--run", "first", *SMALL, "--model", tiny_folder, "--eval-every", "1").code == 0
    assert len(cards) == 2
    assert "| val 3 one-shot | trained | 1 |" in cards[0] and "counted when the training ends" in cards[0]
    assert "puzzles are known to have been trained on" in card.read_text("utf-8")


def card_with(
    changes: Mapping[str, object] = MappingProxyType({}),
    evaluations: Mapping[str, Mapping[int, Evaluated]] = MappingProxyType({}),
) -> str:
    """The card of a run with these settings and evaluations."""
    return model_card("n\n|`", values(resolve().settings) | dict(changes), evaluations, contamination="not\nknown")


def start_of(cell: str) -> dict[str, dict[int, Evaluated]]:
    return {cell: {0: Evaluated(0, cell, 4, 0.25, (0.0, 0.5), 0.25, 1.0, 9.5, {}, "1000", [])}}


def test_a_card_describes_the_task_and_data_it_was_trained_on() -> None:
    countdown, own, files = card_with(), card_with({"task.task": "own.py"}), card_with({"task.puzzles": "mine.csv"})
    assert "exactly once" in countdown and "have even numbers only" in countdown
    assert "from files" in files and "even numbers" not in files
    assert "the task `own.py`" in own and "solves countdown puzzles" not in own


def test_a_card_lists_what_differs_from_the_default_loss_reward_and_sampling() -> None:
    changed = {"loss.dual_clip": 3.0, "loss.kl_in": "reward", "reward.length_penalty": 0.1, "train.save_every": 7}
    rows = [
        [line for line in card.splitlines() if line.startswith("| `")] for card in (card_with(), card_with(changed))
    ]
    added = ["| `loss.dual_clip` | `3.0` |", "| `loss.kl_in` | `reward` |", "| `reward.length_penalty` | `0.1` |"]
    assert rows[1] == [*rows[0], *added]


def test_a_card_names_the_warm_start_and_mixed_prompts() -> None:
    mixed = "one-shot = 1, zero-shot = 1"
    card = card_with({"train.warm_start": 480, "train.prompt_style": mixed}, start_of("val 3 one-shot"))
    assert "Trained from `builtin` by imitating 480 worked searches, then by GRPO" in card
    assert "| val 3 one-shot | after the warm start | 0 | 25.0% |" in card
    impatient = card_with({"train.warm_start": 640, "train.warm_start_impatient": 160})
    assert "imitating 640 worked searches, 160 of them again as searches that mostly give up, then by GRPO" in impatient
    assert f"prompts in `{mixed}` style" in card


@pytest.mark.parametrize(
    ("base", "named"),
    [("owner/base", "owner/base"), ("builtin", None), ("models/mine", None), ("../models/mine", None)],
)
def test_a_card_names_the_base_model_to_the_hub_only_if_it_is_there(
    base: str, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work" if base.startswith("..") else tmp_path)
    header = vars(ModelCard(card_with({"model.model": base})).data)
    licenses = {"builtin": "apache-2.0", "models/mine": "mit", "../models/mine": "mit"}
    assert header.get("base_model") == named and "grpo" in header["tags"]
    assert header.get("license") == licenses.get(base)


def test_the_text_of_a_run_cannot_act_in_its_card() -> None:
    card = card_with({"task.task": "a`b|c\n# {{ 7 * 7 }}"}, start_of("x|y\n"))
    assert "# n\\n\\|'\n" in card and "`a'b\\|c\\n# {{ 7 * 7 }}`" in card
    assert "| x\\|y\\n | base | 0 | 25.0% | 0.0 to 50.0% | 4 |" in card and "Not\\nknown." in card


def test_an_exported_folder_holds_the_model_and_a_card_with_its_results(trained: Command, tmp_path: Path) -> None:
    result = trained("export", "first", "shared")
    assert result.code == 0
    assert str(Path("shared") / "README.md") in result.out.splitlines()
    saved = (tmp_path / "runs" / "first" / "model" / "README.md").read_bytes()
    assert saved == (tmp_path / "shared" / "README.md").read_bytes()
    modes = {(tmp_path / "shared" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # whoever may read one may read both
    card = (tmp_path / "shared" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    lines = (tmp_path / "runs" / "first" / "evaluations.jsonl").read_text("utf-8").splitlines()
    base = json.loads(lines[0])
    assert f"| val 3 one-shot | base | 0 | {base['accuracy']:.1%} |" in card
    assert "| `train.num_iterations` | `2` |" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shared", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "shared", local_files_only=True)
    assert model.num_parameters() > 0 and tokenizer.chat_template


def usage(folder: Path) -> str:
    """The code of a card's usage, on its own folder."""
    card = (folder / "README.md").read_text("utf-8")
    return card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(folder))


@pytest.mark.parametrize("style", ["one-shot", "zero-shot", "natural"])
def test_the_code_of_a_card_answers_as_solve_does(trained: Command, tmp_path: Path, style: str) -> None:
    run = tmp_path / "runs" / "first"
    shutil.rmtree(run / "model")
    shutil.copytree(BUILTIN, run / "model")
    settings = (run / "config.json").read_text().replace('"max_new_tokens": 360', '"max_new_tokens": 60')
    (run / "config.json").write_text(settings.replace('"one-shot"', f'"{style}"'))
    assert trained("export", "first", "shared").code == 0
    names: dict[str, Any] = {}
    with redirect_stdout(StringIO()) as printed:
        exec(usage(tmp_path / "shared"), names)
    messages, template = names["messages"], names["tokenizer"].apply_chat_template
    solved = trained("solve", messages[-1]["content"], "--model", "shared", "--style", style, "--max-new-tokens", 60)
    assert len(printed.getvalue()) > 40 and printed.getvalue().strip() in solved.err
    assert template(messages[1:], tokenize=False) == template(
        messages, tokenize=False
    )  # the system turn is the default


def test_the_code_of_a_card_asks_an_own_task(countdown: Command, tiny_folder: Path, tmp_path: Path) -> None:
    task = tmp_path / "own.py"
    task.write_text(
        "def problems(split): return [f'{split} {n}' for n in range(40)]\n"
        "def prompt(problem): return [{'role': 'system', 'content': '```'}, {'role': 'user', 'content': problem}]\n"
        "def score(completion, problem): return float('a' in completion)\n"
    )
    done = countdown("train", "--task", task, "--model", tiny_folder, "--run", "first", *SMALL)
    assert done.code == 0, done.err
    assert countdown("export", "first", "shared").code == 0
    names: dict[str, Any] = {}
    exec(usage(tmp_path / "shared").partition("inputs =")[0], names)
    assert names["messages"][0]["content"] == "```" and names["messages"][1]["content"] == "val 0"
    task.unlink()
    load_task.cache_clear()
    assert countdown("export", "first", "shared", "--overwrite").code == 0
    assert '"content": "..."' in usage(tmp_path / "shared")


def test_an_exported_model_decodes_greedily_until_its_end(trained: Command, tmp_path: Path) -> None:
    assert trained("export", "first", "shared").code == 0
    saved = GenerationConfig.from_pretrained(tmp_path / "shared")
    assert (saved.do_sample, saved.max_new_tokens) == (False, 360)
    assert set(saved.eos_token_id) == set(load(str(tmp_path / "shared")).end_ids)


def test_an_export_may_hold_a_gguf_file(trained: Command, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    result = trained("export", "first", "shared", "--gguf", "f16")
    assert result.code == 0 and result.err == ""
    assert {str(Path("shared") / name) for name in ("first-f16.gguf", "Modelfile")} <= set(result.out.splitlines())
    assert (tmp_path / "shared" / "first-f16.gguf").read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda: None, ("nobody", "shared"), "no run `nobody`"),
        (lambda: Path("shared").write_text("mine"), ("first", "shared"), "`shared` is not a folder"),
        (lambda: shutil.copytree("runs", "mine"), ("first", "mine", "--overwrite"), "other files"),
        (lambda: None, ("first", "no/where"), "`no` is not a folder"),
        (lambda: None, ("first", "first.gguf"), "`first.gguf` names a file, and an export is a folder"),
        (lambda: None, ("first", "out", "--push", "noslash"), "`noslash` cannot name a repository"),
        (lambda: Path("runs/first/origin.json").write_text("{"), ("first", "out"), "`runs/first/origin.json` is not"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    trained: Command, prepare: Callable[[], object], arguments: tuple[str, ...], message: str
) -> None:
    prepare()
    result = trained("export", *arguments)
    assert result.code == 2
    assert message in result.err
    assert not Path("out").exists()


def test_a_failed_copy_is_one_sentence(trained: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device")])

    monkeypatch.setattr(shutil, "copytree", fail)
    result = trained("export", "first", "out")
    assert result.code == 1 and "cannot copy `a`" in result.err and not Path("out").exists()


def test_a_model_without_weights_is_not_exported(trained: Command, tmp_path: Path) -> None:
    for weights in (tmp_path / "runs" / "first" / "model").glob("*.safetensors"):
        weights.unlink()
    done = trained("export", "first", "out")
    assert done.code == 2 and "has no weights" in done.err
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_not_exported(trained: Command, tmp_path: Path) -> None:
    model = tmp_path / "runs" / "first" / "model"
    whole, config = (model / "model.safetensors").read_bytes(), (model / "config.json").read_text()
    wide = config.replace('"hidden_size": 32', '"hidden_size": 256')
    for weights, text in ((whole[:-1], config), (b"", config), (whole, "{}"), (whole, wide)):
        (model / "model.safetensors").write_bytes(weights)
        (model / "config.json").write_text(text)
        done = trained("export", "first", "out", "--push", "me/first")
        assert done.code == 2 and ("cannot load `" in done.err or "describes" in done.err), done.err
        assert not (tmp_path / "out").exists()


def test_export_again_needs_overwrite_and_pushes_only_when_asked(
    trained: Command, uploads: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    assert trained("export", "first", "shared").code == 0
    again = trained("export", "first", "shared")
    assert again.code == 2 and "--overwrite" in again.err and uploads == {}
    found = trained(*PUSH)
    assert found.code == 0 and "pushed to https://huggingface.co/me/first" in found.err
    assert uploads["me/first"] == {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= uploads["me/first"].keys()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("export first runs/other/model --overwrite", "is in the run"),
        ("export first runs/first/model --overwrite", "is in the run"),
        ("export first runs/zz", "`runs/zz` would be taken for a run"),
        ("export first link/model --overwrite", "is in the run"),
        ("plot first --out runs/other --overwrite", "is in the run"),
        ("plot runs/first/metrics.jsonl --out runs/other", "is in the run"),
        ("eval builtin --limit 1 --out runs/other/samples.jsonl --overwrite", "is in the run"),
        ("why first --step 2 --html runs/other/page.html", "is in the run"),
        ("why first --step 2 --figure link/fork.png", "is in the run"),
        ("gen-data --out runs/other/new.jsonl", "is in the run"),
        ("gen-data --out runs/begun/new.jsonl", "is in the run"),
        ("train --runs runs/other --run inner", "is in the run"),
    ],
)
def test_no_command_writes_into_another_run(line: str, error: str, trained: Command, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "runs" / "first", tmp_path / "runs" / "other")
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / ".lock").touch()  # a training that is loading its model
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "other")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = trained(*line.split())
    assert refused.code == 2 and error in refused.err and "hint: " in refused.err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_s_own_plots_are_rewritten(trained: Command, tmp_path: Path) -> None:
    for arguments in ([], ["--out", tmp_path / "runs" / "first", "--overwrite"]):
        assert trained("plot", "first", *arguments).code == 0


@pytest.mark.parametrize("error", [ConnectionError("refused"), LocalTokenNotFoundError("none")])
def test_a_refused_push_is_one_sentence_and_leaves_the_folder_whole(
    trained: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fail)
    refused = trained(*PUSH)
    assert refused.code == 1 and "hint: " in refused.err and "Traceback" not in refused.err
    assert (tmp_path / "shared" / "model.safetensors").is_file()


def test_resuming_a_finished_run_says_that_nothing_was_left_to_do(trained: Command) -> None:
    resumed = trained("train", "--run", "first", "--resume")
    assert resumed.code == 0
    assert "all 2 steps are done; train on with: countdown train --run first --resume --num-iterations 4" in resumed.err


def test_solve_names_a_model_that_it_chose(trained: Command) -> None:
    assert "model: first\n" in trained("solve", "4 6 10 = 64", "--max-new-tokens", 8).err
    assert "model:" not in trained("solve", "4 6 10 = 64", "--model", "builtin", "--max-new-tokens", 8).err
    assert "model:" not in trained("solve", "4 6 10 = 64", "--json", "--max-new-tokens", 8).err


def test_runs_lists_what_differs_and_deletes_only_after_asking(trained: Command, tmp_path: Path) -> None:
    listed = json.loads(trained("runs", "--json").out)["runs"]
    assert [row["run"] for row in listed] == ["first"]
    assert listed[0]["step"] == 2 and listed[0]["settings"]["train.batch_size"] == 2
    assert "first" in trained("runs").out
    assert trained("runs", "--delete", "first").code == 1  # nobody answers
    assert (tmp_path / "runs" / "first").is_dir()
    assert trained("runs", "--delete", "first", "--yes").code == 0
    assert not (tmp_path / "runs" / "first").exists()
    assert trained("runs", "--delete", "first", "--yes").code == 2


@pytest.fixture
def several(trained: Command, tmp_path: Path) -> Command:
    """`countdown` beside runs `first`, and `second` and `third` of other seeds with other evaluations."""
    for seed, name in ((1, "second"), (2, "third")):
        folder = tmp_path / "runs" / name
        shutil.copytree(tmp_path / "runs" / "first", folder)
        config = json.loads((folder / "config.json").read_text())
        config["train"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(config))
        for log, keys in (("metrics.jsonl", ["val_accuracy", "dev_accuracy"]), ("evaluations.jsonl", ["accuracy"])):
            lines = [json.loads(line) for line in (folder / log).read_text().splitlines()]
            for line in lines:
                line |= {key: seed / 2 for key in keys if key in line and line["step"]}
                if "solved" in line and line["step"]:
                    line["solved"] = "1" * (line["count"] * seed // 2) + "0" * (
                        line["count"] - line["count"] * seed // 2
                    )
            (folder / log).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return trained


def test_runs_are_sorted_filtered_and_summed_up_by_seed(several: Command) -> None:
    listed = json.loads(several("runs", "--json", "--sort", "accuracy").out)
    assert [row["run"] for row in listed["runs"]] == ["third", "second", "first"]
    (group,) = listed["groups"]
    assert sorted(group["runs"]) == ["first", "second", "third"] and sorted(group["seeds"]) == [0, 1, 2]
    assert group["mean"] == 0.5 and group["range"] == [0.0, 1.0]
    assert "differ only in the seed: best 50.0% on average" in several("runs").out
    shutil.copytree("runs/third", "runs/third-again")  # the same seed again is no further seed
    (again,) = json.loads(several("runs", "--json").out)["groups"]
    assert (again["runs"], again["mean"]) == (["first", "second", "third"], 0.5)
    shutil.rmtree("runs/third-again")
    metrics = Path("runs/third/metrics.jsonl")
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # a training that has not ended
    (ended,) = json.loads(several("runs", "--json").out)["groups"]
    assert (ended["runs"], ended["mean"]) == (["first", "second"], 0.25)
    metrics.write_text(whole)
    for condition in ("seed=1", "train.seed=1"):
        assert [row["run"] for row in json.loads(several("runs", "--json", "--where", condition).out)["runs"]] == [
            "second"
        ]
    for condition in ("break=none", "batch-size=2"):
        assert len(json.loads(several("runs", "--json", "--where", condition).out)["runs"]) == 3
    for none in (["learning_rate=3"], ["loss-type=ppo"], ["seed=1", "--where", "seed=2"]):
        assert several("runs", "--where", *none).err == "no run has these settings\n"
    assert len(json.loads(several("runs", "--json", "--where", "batch_size=2", "--where", "seed=2").out)["runs"]) == 1


@pytest.mark.parametrize(
    ("condition", "hint"),
    [("sed=1", "did you mean `--where seed=1`?"), ("seed", "`--where seed=1`"), ("zzz=", "`--where seed=1`")],
)
def test_a_condition_that_is_no_setting_is_refused(several: Command, condition: str, hint: str) -> None:
    refused = several("runs", "--where", condition)
    assert refused.code == 2 and "is not a setting with its value" in refused.err and hint in refused.err


def test_stored_evaluations_are_compared_without_a_model(several: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_cli.core.model.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    rows = json.loads(several("compare", "first", "second", "third", "--json").out)["paired"]
    assert [(row["first"], row["second"], row["cell"]) for row in rows] == [
        ("first", "second", "val 3 one-shot"), ("first", "third", "val 3 one-shot"),
    ]  # fmt: skip
    assert [(row["gained"], row["lost"], row["count"]) for row in rows] == [(1, 0, 2), (2, 0, 2)]
    assert rows[1]["p_value"] == 0.5  # 2 / 2^2
    own = json.loads(several("compare", "third", "--json").out)["paired"]
    assert (own[0]["first"], own[0]["first_accuracy"], own[0]["second_accuracy"]) == ("third, step 0", 0.0, 1.0)
    assert "val 3 one-shot" in several("compare", "first", "second").out


def test_a_planted_bug_is_named_wherever_its_run_is_used(several: Command, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "second" / "config.json"
    config = json.loads(path.read_text())
    config["train"]["broken"] = "groups"
    path.write_text(json.dumps(config))
    commands = ["compare first second", "eval second --limit 1 --json", "export second out", "solve 2,3,5=10"]
    for command in (*commands[:3], f"{commands[3]} --model second"):
        found = several(*command.split())
        assert "`second` was trained with a bug planted on purpose: `--break groups`" in found.err.replace("\n", " ")
    assert "planted on purpose, `--break groups`" in (tmp_path / "out" / "README.md").read_text()
    assert "planted" not in several("compare", "first", "third").err


@pytest.mark.parametrize("name", ["first/checkpoints/step-2", "runs/first/model", "./runs/first/checkpoints/step-2/"])
def test_a_folder_within_a_run_is_refused_by_the_runs_name(trained: Command, name: str) -> None:
    for command in (["export", name, "out"], ["why", name], ["compare", name]):
        refused = trained(*command)
        assert (refused.code, "hint: name the run: `first`" in refused.err) == (2, True)


def test_runs_on_other_puzzles_are_not_compared(several: Command, tmp_path: Path) -> None:
    log = tmp_path / "runs" / "second" / "evaluations.jsonl"
    log.write_text(re.sub(r'"puzzles": "\w+"', '"puzzles": "0"', log.read_text()))
    for root, suffix in ((), ""), (("--runs", f"{tmp_path}/runs/"), f" --runs {tmp_path}/runs"):
        refused = several("compare", "first", "second", *root)
        assert refused.code == 2 and "no evaluations on the same puzzles" in refused.err
        assert f"`countdown eval first second{suffix}" in refused.err.replace("\n", "")
    assert several("compare", "first", "nobody").code == 2
    metrics = tmp_path / "runs" / "third" / "metrics.jsonl"
    metrics.write_text("".join(f"{line}\n" for line in metrics.read_text().splitlines() if '"step": 0' in line))
    for names in (["third"], ["first", "third"]):
        early = several("compare", *names)
        assert early.code == 2 and "has not evaluated a trained model yet" in early.err
        assert "hint: resume it with `countdown train --run third --resume" in early.err
