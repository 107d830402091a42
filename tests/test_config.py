"""Where each setting's value comes from, and what is refused on the way."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel

from grpo_cli.cli.options import PANELS
from grpo_cli.core.config.resolve import SHIPPED, Resolved, as_option, defaults, flag, resolve, restore, variable
from grpo_cli.core.config.settings import FIELDS, TABLES, Settings, describe, digest, fixed, panel
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.prompts import STYLES


def resolved(
    folder: Path,
    text: str | bytes | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    has_cuda: bool = False,
) -> Resolved:
    if text is not None:
        (folder / "config.toml").write_bytes(text.encode() if isinstance(text, str) else text)
    file = folder / "config.toml"
    given = file if file.exists() else None
    return resolve(flags=flags or {}, environ=environ or {}, config_file=given, has_cuda=lambda: has_cuda)


def refused(folder: Path, text: str | bytes | None = None, **layers: Mapping[str, object]) -> CountdownError:
    with pytest.raises(CountdownError) as caught:
        resolved(folder, text, **layers)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return caught.value


def test_every_default_stands_in_config_toml_and_nowhere_else() -> None:
    assert defaults().keys() == FIELDS.keys()
    models: list[type[BaseModel]] = [Settings, *TABLES.values()]
    assert all(field.is_required() for model in models for field in model.model_fields.values())


def test_every_line_of_config_toml_says_what_the_help_says() -> None:
    comments: dict[str, str] = {}
    table = ""
    for line in SHIPPED.read_text("utf-8").splitlines():
        if header := re.fullmatch(r"\[(.+)\]", line):
            table = header[1]
        if setting := re.fullmatch(r"(\w+) = \S+ +# (.+)", line):
            key = f"{table}.{setting[1]}".lstrip(".").replace("preset.name", "preset")
            comments[key] = setting[2]
    assert comments == {key: describe(key) for key in FIELDS}


@pytest.mark.parametrize(("preset", "precision"), [("qwen2.5-1.5b-original", "bf16"), ("qwen2.5-1.5b", "bf16-master")])
def test_the_qwen_presets_have_the_hyperparameters_of_the_original_and_one_keeps_masters(
    tmp_path: Path, preset: str, precision: str
) -> None:
    settings = resolved(tmp_path, flags={"preset": preset}).settings
    train, loss = settings.train, settings.loss
    assert settings.model.model == "Qwen/Qwen2.5-1.5B-Instruct"
    assert (train.learning_rate, train.batch_size, train.num_generations) == (2e-6, 4, 16)
    assert (train.max_new_tokens, train.num_iterations, train.num_inner_updates) == (160, 1200, 1)
    assert (train.clip_grad_norm, train.temperature, train.optimizer) == (0.5, 1.2, "adamw8bit")
    assert (loss.loss_type, loss.beta, loss.epsilon, loss.epsilon_high) == ("grpo", 0.01, 0.2, 0.2)
    assert (settings.model.precision, settings.model.gradient_checkpointing) == (precision, "auto")


def test_each_layer_wins_over_the_ones_before_it(tmp_path: Path) -> None:
    key, environ, flags = "train.batch_size", {"COUNTDOWN_TRAIN_BATCH_SIZE": "14"}, {"train.batch_size": "15"}
    text = "[preset.mine.train]\nseed = 1\n[train]\nbatch_size = 11\n"
    mine = text + "[preset]\nname = 'mine'\n"
    preset = mine.replace("seed = 1", "seed = 1\nbatch_size = 13")
    path = f"{tmp_path}/config.toml"
    found = [
        resolved(tmp_path, "preset = {name = 'mine', mine = {}}"),
        resolved(tmp_path, mine),
        resolved(tmp_path, preset),
        resolved(tmp_path, preset, environ=environ),
        resolved(tmp_path, preset, environ=environ, flags=flags),
    ]
    assert [one.settings.train.batch_size for one in found] == [4, 11, 13, 14, 15]
    assert [one.sources[key] for one in found] == [
        "config.toml", path, f"preset mine in {path}", "COUNTDOWN_TRAIN_BATCH_SIZE", "flag --batch-size",
    ]  # fmt: skip


def test_your_file_changes_a_shipped_preset_key_by_key(tmp_path: Path) -> None:
    shipped = resolved(tmp_path)
    changed = resolved(tmp_path, "[preset.builtin.train]\nseed = 5\n")
    assert changed.settings.train == shipped.settings.train.model_copy(update={"seed": 5})
    assert shipped.sources["train.learning_rate"] == changed.sources["train.learning_rate"] == "preset builtin"


def test_every_setting_has_a_source(tmp_path: Path) -> None:
    assert resolved(tmp_path).sources.keys() == {*FIELDS, "suite.transfer"}


@pytest.mark.parametrize(
    ("has_cuda", "preset", "reason"),
    [(True, "qwen2.5-1.5b", "a CUDA device was found"), (False, "builtin", "no CUDA device was found")],
)
def test_the_auto_preset_depends_on_cuda(tmp_path: Path, has_cuda: bool, preset: str, reason: str) -> None:
    found = resolved(tmp_path, has_cuda=has_cuda)
    assert (found.settings.preset, found.preset_reason) == (preset, reason)


def test_a_preset_that_is_named_is_used_without_looking_for_cuda() -> None:
    def look() -> bool:
        raise AssertionError

    for flags, environ, source in [
        ({"preset": "builtin"}, {}, "flag --preset"),
        ({}, {"COUNTDOWN_PRESET": "builtin"}, "COUNTDOWN_PRESET"),
    ]:
        found = resolve(flags=flags, environ=environ, has_cuda=look)
        assert (found.settings.preset, found.preset_reason) == ("builtin", f"chosen by {source}")
        assert found.sources["preset"] == source


@pytest.mark.parametrize("text", ["preset = 'qwen2.5-1.5b'", "[preset]\nname = 'qwen2.5-1.5b'"])
def test_a_file_chooses_a_preset_in_either_form(tmp_path: Path, text: str) -> None:
    assert resolved(tmp_path, text).settings.preset == "qwen2.5-1.5b"


def test_the_file_in_the_working_directory_is_told_from_the_shipped_one_and_replaced_by_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SHIPPED.parent)
    assert resolve().sources["train.seed"] == "config.toml"  # no layer of its own
    (tmp_path / "config.toml").write_text("[train]\nseed = 4\n")
    (tmp_path / "other.toml").write_text("[train]\nsave_every = 7\n")
    monkeypatch.chdir(tmp_path)
    for found in (resolve(), resolve(config_file=Path("config.toml"))):
        assert (found.sources["train.seed"], found.sources["runs"]) == ("./config.toml", "config.toml")
    other = resolve(config_file=tmp_path / "other.toml")
    assert (other.settings.train.seed, other.settings.train.save_every) == (0, 7)
    assert other.sources["train.save_every"] == f"{tmp_path}/other.toml"


@pytest.mark.faults
@pytest.mark.parametrize("text", [None, "", "\n", "# a comment", "[train]", b"\xef\xbb\xbf[train]\r\nseed = 0\r\n"])
def test_a_file_that_is_missing_empty_or_from_windows_is_fine(tmp_path: Path, text: str | bytes | None) -> None:
    assert resolved(tmp_path, text).settings == resolved(tmp_path / "nowhere").settings


@pytest.mark.faults
@pytest.mark.parametrize("target", ["nowhere.toml", "config.toml"])
def test_a_file_that_is_a_broken_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    (tmp_path / "config.toml").symlink_to(target)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CountdownError, match=r"cannot read `config\.toml`"):
        resolve()


def test_a_mixture_is_an_option_in_one_line() -> None:
    option = as_option("train.prompt_style", {"one-shot": 0.5, "natural": 1})
    assert option == "--prompt-style=one-shot = 0.5, natural = 1"
    assert resolve(flags={"train.prompt_style": option.partition("=")[2]}).settings.train.prompt_style


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ({"loss.pass_at_k": 2, "loss.scale_rewards": "batch"}, "`scale_rewards` cannot be `batch`"),
        ({"train.warm_start": 8, "train.warm_start_impatient": 9}, "must be at most `warm_start`"),
        ({"eval.temperature": 1e-9}, "must be 0, which is greedy, or at least 0.001"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(flags: dict[str, object], refusal: str) -> None:
    with pytest.raises(CountdownError, match=refusal):
        resolve(flags=flags)


def test_text_is_read_as_the_type_of_the_setting(tmp_path: Path) -> None:
    environ = {
        "COUNTDOWN_TRAIN_LEARNING_RATE": "1e-5",
        "COUNTDOWN_LOSS_BETA": "1",
        "COUNTDOWN_PLOT_SMOOTH": "True",
        "COUNTDOWN_MODEL_MODEL": "1",
        "PATH": "/bin",
    }
    settings = resolved(tmp_path, environ=environ).settings
    assert (settings.train.learning_rate, settings.loss.beta) == (1e-5, 1.0)
    assert (settings.plot.smooth, settings.model.model) == (True, "1")


WRONG = [
    ("train", "batch_size", "true", "a whole number of at least 1 and at most 10000, not `true`"),
    ("train", "batch_size", "'4'", 'a whole number of at least 1 and at most 10000, not `"4"`'),
    ("plot", "smooth", "'true'", '`true` or `false`, not `"true"`'),
    ("train", "batch_size", "0", "a whole number of at least 1 and at most 10000, not `0`"),
    ("train", "batch_size", "{}", "a whole number of at least 1 and at most 10000, not a table"),
    ("train", "seed", "0x" + "f" * 5000, "at least 0 and below 4294967296, not a number of more than 64 bits"),
    ("train", "learning_rate", "nan", "a number above 0 and at most 1000, not `nan`"),
    ("train", "learning_rate", "1e400", "a number above 0 and at most 1000, not `inf`"),
    ("train", "learning_rate", "1e300", "a number above 0 and at most 1000, not `1e+300`"),
    ("train", "temperature", "1e-300", "a number of at least 0.001 and at most 1000000, not `1e-300`"),
    ("reward", "format_reward", "1e300", "a number of at least 0 and at most 1000000, not `1e+300`"),
    ("loss", "epsilon", "1", "a number above 0 and below 1, not `1`"),
    ("task", "numbers", "7", "a whole number of at least 2 and at most 6, not `7`"),
    ("loss", "kl_in", "'k2'", "one of `loss`, `reward`, not `k2`"),
    ("model", "model", "''", "text that is not empty, not ``"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("table", "name", "value", "complaint"), WRONG)
def test_a_wrong_value_in_a_file_names_file_key_and_range(
    tmp_path: Path, table: str, name: str, value: str, complaint: str
) -> None:
    message = refused(tmp_path, f"[{table}]\n{name} = {value}\n").message
    assert message.startswith(f"`{table}.{name}` in `{tmp_path}/config.toml` must be ")
    assert message.endswith(complaint)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.batch_size", "four"),
        ("train.batch_size", "4.0"),
        ("train.batch_size", "true"),
        ("train.batch_size", "9" * 5000),
        ("train.learning_rate", "nan"),
        ("train.learning_rate", "-inf"),
        ("train.learning_rate", ""),
        ("plot.smooth", "yes"),
        ("plot.smooth", "1"),
        ("loss.loss_type", "GRPO"),
        ("runs", ""),
    ],
)
def test_a_wrong_text_names_its_variable_or_flag(tmp_path: Path, key: str, text: str) -> None:
    assert refused(tmp_path, environ={variable(key): text}).message.startswith(f"`{variable(key)}` must be ")
    assert refused(tmp_path, flags={key: text}).message.startswith(f"`{flag(key)}` must be ")


def test_a_long_value_is_cut_short_in_the_message(tmp_path: Path) -> None:
    assert len(refused(tmp_path, flags={"train.seed": "x" * 10_000}).message) < 200


@pytest.mark.faults
def test_a_wrong_value_is_found_where_a_stronger_layer_hides_it(tmp_path: Path) -> None:
    hidden = refused(tmp_path, "[train]\nlearning_rate = -1\n", flags={"train.learning_rate": 1})
    assert hidden.message.startswith(f"`train.learning_rate` in `{tmp_path}/config.toml`")
    unused = refused(tmp_path, "[preset.other.train]\nseed = -1\n", flags={"preset": "builtin"})
    assert unused.message.startswith(f"`preset.other.train.seed` in `{tmp_path}/config.toml`")
    shadowed = refused(tmp_path, "", environ={"COUNTDOWN_TRAIN_SEED": "x"}, flags={"train.seed": 1})
    assert shadowed.message.startswith("`COUNTDOWN_TRAIN_SEED`")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "name", "nearest"),
    [
        ("[train]\nlearning_rat = 1\n", "train.learning_rat", "train.learning_rate"),
        ("[loss]\nlearning_rate = 1\n", "loss.learning_rate", "train.learning_rate"),
        ("learning_rate = 1\n", "learning_rate", "train.learning_rate"),
        ("run = 'x'\n", "run", "runs"),
        ("[trian]\nseed = 1\n", "trian", "train"),
        ("[preset.builtin.train]\nsede = 1\n", "preset.builtin.train.sede", "train.seed"),
        ("[preset.builtin.trian]\nseed = 1\n", "preset.builtin.trian", "train"),
        ("[preset]\nnaem = 'builtin'\n", "preset.naem", "preset.name"),
    ],
)
def test_an_unknown_name_in_a_file_is_met_with_the_nearest(tmp_path: Path, text: str, name: str, nearest: str) -> None:
    error = refused(tmp_path, text)
    assert error.message == f"unknown setting `{name}` in `{tmp_path}/config.toml`"
    assert error.hint == f"did you mean `{nearest}`?"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BATCH_SIZE", "TRAIN_BATCH_SIZE"),
        ("TRAIN_BATCHSIZE", "TRAIN_BATCH_SIZE"),
        ("LR", "TRAIN_LEARNING_RATE"),
        ("TRAIN_BETA", "LOSS_BETA"),
        ("EVAL_BATCHSIZE", "EVAL_BATCH_SIZE"),
    ],
)
def test_an_unknown_variable_is_met_with_the_nearest(tmp_path: Path, name: str, meant: str) -> None:
    error = refused(tmp_path, environ={f"COUNTDOWN_{name}": "4"})
    assert error.message == f"unknown setting `COUNTDOWN_{name}` in the environment"
    assert error.hint == f"did you mean `COUNTDOWN_{meant}`?"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"model.lora_targets": "q_proj"}, "`--lora-targets` has no effect without `--lora-rank`"),
        ({"reward.soft_limit": "40"}, "`--soft-limit` has no effect without `--length-penalty`"),
        ({"loss.beta": "0", "loss.kl_estimator": "original"}, "`--kl-estimator` has no effect without `--beta`"),
        ({"loss.loss_type": "cispo", "loss.dual_clip": "3"}, "`--dual-clip` has no effect with `--loss-type cispo`"),
        ({"loss.kl_in": "reward", "loss.kl_estimator": "k2"}, "`--kl-estimator` has no effect with `--kl-in reward`"),
        ({"plot.window": "5"}, "`--window` has no effect without `--smooth`"),
        ({"task.task": "mine.py", "task.numbers": "4"}, "`--numbers` has no effect with `--task mine.py`"),
        ({"task.task": "gym:bf", "task.use_all": False}, "`--no-use-all` has no effect with `--task gym:bf`"),
        ({"task.puzzles": "a.csv", "train.warm_start": "8"}, "`--warm-start` has no effect with `--puzzles a.csv`"),
    ],
)
def test_a_flag_without_effect_is_refused(tmp_path: Path, flags: dict[str, object], error: str) -> None:
    found = refused(tmp_path, flags=flags)
    assert found.message == error and found.hint
    resolve(flags={"model.lora_alpha": "32"})  # its default


def test_a_setting_in_a_file_waits_for_the_one_that_it_needs(tmp_path: Path) -> None:
    resolved(tmp_path, '[model]\nlora_targets = "q_proj"\n')
    resolved(tmp_path, flags={"model.lora_rank": "4", "model.lora_alpha": "7"})


def test_a_name_like_no_other_is_refused_without_a_guess(tmp_path: Path) -> None:
    assert refused(tmp_path, "zzzz = 1").hint is None


def test_a_preset_cannot_choose_a_preset(tmp_path: Path) -> None:
    assert "unknown setting `preset.builtin.preset`" in refused(tmp_path, "[preset.builtin]\npreset = 'x'").message


def test_an_unknown_preset_is_met_with_the_known_ones(tmp_path: Path) -> None:
    error = refused(tmp_path, "[preset.mine]\n", flags={"preset": "buitlin"})
    assert error.message == "`--preset` is not a preset: `buitlin`"
    shipped = "`builtin`, `mine`, `qwen2.5-0.5b`, `qwen2.5-1.5b`, `qwen2.5-1.5b-original`, `smollm2-135m`"
    assert error.hint == f"presets are `auto`, {shipped}"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train = 3", "`train` in `{}` must be a table"),
        ("[[train]]", "`train` in `{}` must be a table"),
        ("[preset.builtin]\ntrain = 3", "`preset.builtin.train` in `{}` must be a table"),
        ("preset = 3", "`preset` in `{}` must be a table or the name of a preset"),
        ("[preset]\nname = 3", "`preset.name` in `{}` must be text that is not empty, not `3`"),
        ("[train]\nseed = 1\nseed = 2", "`{}` is not valid TOML: "),
        ("[train]\n[train]", "`{}` is not valid TOML: "),
        ("[train", "`{}` is not valid TOML: "),
        ("seed", "`{}` is not valid TOML: "),
        ("x = " + "1" * 5000, "`{}` is not valid TOML: "),
        ("x = " + "[" * 2000 + "]" * 2000, "`{}` is nested too deeply"),
        ("x = " + "{a = " * 2000 + "1" + "}" * 2000, "`{}` is nested too deeply"),
        ("a" + ".a" * 2000 + " = 1", "`{}` is nested too deeply"),
        ("x = " + "[" * 300 + "]" * 300, "unknown setting `x` in `{}`"),
        (b"[train]\n# caf\xe9\n", "`{}` is not UTF-8 text (byte 13)"),
        (b"\xff\xfe[\x00", "`{}` is not UTF-8 text (byte 0)"),
        (b"runs = '\x00'", "`{}` is not valid TOML: "),
        (b"#" * 2**21, "`{}` is too large for a settings file"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    assert refused(tmp_path, text).message.startswith(complaint.format(tmp_path / "config.toml"))


@pytest.mark.faults
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "none.toml", "No such file or directory"), (tmp_path, "Is a directory")]:
        with pytest.raises(CountdownError, match=re.escape(f"cannot read `{path}`: {reason}")):
            resolve(config_file=path)


def test_a_default_that_was_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "config.toml"
    broken.write_text(re.sub(r"(?m)^save_every.*$", "", SHIPPED.read_text("utf-8")), "utf-8")
    monkeypatch.setattr("grpo_cli.core.config.resolve.SHIPPED", broken)
    with pytest.raises(CountdownError, match=re.escape(f"`{broken}` has no `train.save_every`")):
        resolve()


def test_a_run_goes_on_with_its_own_settings_under_new_flags(tmp_path: Path) -> None:
    first = resolved(tmp_path, flags={"train.seed": 7, "preset": "qwen2.5-1.5b"})
    again = restore(first.settings.model_dump(), tmp_path / "config.json", flags={"train.num_iterations": "5"})
    assert again.settings.train == first.settings.train.model_copy(update={"num_iterations": 5})
    assert (again.settings.preset, again.sources["train.seed"]) == ("qwen2.5-1.5b", f"{tmp_path}/config.json")
    assert again.sources["train.num_iterations"] == "flag --num-iterations"


@pytest.mark.faults
def test_a_saved_configuration_that_was_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for saved, complaint in [({"seed": -1}, "`train.seed` in"), ({"sede": 1}, "unknown setting `train.sede`")]:
        with pytest.raises(CountdownError, match=complaint):
            restore({"train": saved}, path)
    whole = resolved(tmp_path).settings.model_dump()
    for gone in ("task", "model", "train"):
        with pytest.raises(CountdownError, match=f"config.json` has no settings of `{gone}`"):
            restore({key: value for key, value in whole.items() if key != gone}, path)
    with pytest.raises(CountdownError, match="no settings of `task`, `model`, `train`"):
        restore({}, path)


def test_a_run_that_goes_on_keeps_its_preset(tmp_path: Path) -> None:
    with pytest.raises(CountdownError, match="keeps its preset"):
        restore({}, tmp_path / "config.json", flags={"preset": "builtin"})


def test_the_names_of_a_setting_follow_from_its_key() -> None:
    assert (flag("train.batch_size"), variable("train.batch_size")) == ("--batch-size", "COUNTDOWN_TRAIN_BATCH_SIZE")
    assert (flag("preset"), variable("preset")) == ("--preset", "COUNTDOWN_PRESET")


# Suites and schedules


def test_the_shipped_suite_crosses_splits_numbers_and_styles(tmp_path: Path) -> None:
    cells = resolved(tmp_path).settings.suite["transfer"]
    assert set(cells) == {f"{split} {n} {style}" for split in ("val", "train") for n in (3, 4) for style in STYLES}
    assert all(weight == float(name.startswith("val")) for name, weight in cells.items())


def test_a_suite_of_your_own_stands_beside_the_shipped_one_or_replaces_it(tmp_path: Path) -> None:
    text = '[suite.mine]\n"val  4 natural" = 2\n[suite.transfer]\n"val 3 one-shot" = 1.5'
    found = resolved(tmp_path, text, flags={"train.eval_suite": "mine"})
    assert found.settings.suite == {"transfer": {"val 3 one-shot": 1.5}, "mine": {"val 4 natural": 2.0}}
    assert found.sources["suite.mine"].endswith("config.toml") and found.settings.train.eval_suite == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("suite = 3", "must be a table"),
        ("[suite]\na = 3", "`suite.a` in"),
        ('[suite.a]\n"val 3 oneshot" = 1', "did you mean `val 3 one-shot`?"),
        ('[suite.a]\n"val 3 one-shot" = -1', "the weight of `val 3 one-shot` must be a number of at least 0"),
        ('[suite.a]\n"val 3 one-shot" = nan', "the weight of `val 3 one-shot`"),
        ("[suite.a]", "no cell has a weight above 0"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text).message


def test_a_suite_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    problem = refused(tmp_path, flags={"train.eval_suite": "transfr"})
    assert problem.message == "`--eval-suite` is not a suite: `transfr`"
    assert problem.hint == "did you mean `transfer`? suites are `transfer`; add one as [suite.NAME]"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("prompt_numbers = 4", "4"),
        ("prompt_numbers = {3 = 0.5, 4 = 0.5}", "3 = 0.5, 4 = 0.5"),
        ("prompt_style = {one-shot = 1, natural = 3}", "one-shot = 1, natural = 3"),
        ('prompt_style = "one-shot -> zero-shot, linear over 9 steps"', "one-shot -> zero-shot, linear over 9 steps"),
        ('prompt_style = "task"', "task"),
    ],
)
def test_a_schedule_is_one_of_them_a_table_of_weights_or_a_line(tmp_path: Path, line: str, expected: str) -> None:
    train = resolved(tmp_path, f"[train]\n{line}").settings.train
    assert expected in (train.prompt_style, train.prompt_numbers)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prompt_numbers = 7", "`7` is not one of 2, 3, 4, 5, 6"),
        ("prompt_numbers = true", "must be"),
        ("prompt_style = {one-shot = -1}", "`-1` is not a weight"),
        ('prompt_style = "one-shot, natural"', "`one-shot` has no weight"),
        ('prompt_style = "oneshot"', "`oneshot` is not one of one-shot, zero-shot, natural"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(tmp_path: Path, line: str, said: str) -> None:
    problem = refused(tmp_path, f"[train]\n{line}")
    assert said in problem.message and f"train.{line.split()[0]}" in problem.message


def test_a_run_that_goes_on_keeps_its_suite(tmp_path: Path) -> None:
    plain = resolved(tmp_path).settings
    given = resolved(tmp_path, flags={"train.eval_suite": "transfer"}).settings
    other = given.model_copy(update={"suite": {"transfer": {"val 3 one-shot": 2.0}}})
    assert len({digest(settings) for settings in (plain, given, other)}) == 3
    unused = plain.model_copy(update={"suite": {}})
    assert digest(unused) == digest(plain)


def test_what_a_user_writes_beats_what_ships(tmp_path: Path) -> None:
    """The user's general tables above a shipped preset, the user's tables for that preset above them."""
    text = "[train]\nbatch_size = 3\nseed = 4\n[preset.builtin.train]\nseed = 5\n"
    found = resolved(tmp_path, text, flags={"preset": "builtin"})
    assert (found.settings.train.batch_size, found.settings.train.seed) == (3, 5)
    assert found.sources["train.batch_size"] == f"{tmp_path}/config.toml"
    assert found.settings.train.max_new_tokens == 360  # of the preset as shipped


def test_a_misspelled_preset_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, "[preset.biultin.train]\nseed = 5\n", flags={"preset": "builtin"})
    assert "`preset.biultin.train.seed`" in error.message and "changes nothing" in error.message
    assert error.hint == "did you mean `builtin`?"
    resolved(tmp_path, "[preset.mine.model]\nmodel = 'x/y'\n", flags={"preset": "builtin"})  # one for later


@pytest.mark.faults
@pytest.mark.parametrize("name", ["number", "target"])
def test_bounds_in_the_wrong_order_are_named_with_their_places(tmp_path: Path, name: str) -> None:
    low, high = f"min_{name}", f"max_{name}"
    shipped = defaults()[f"task.{high}"]
    for layers, place in (
        ({"flags": {f"task.{low}": "1000"}}, f"`--{low.replace('_', '-')}`"),
        ({"environ": {f"COUNTDOWN_TASK_{low.upper()}": "1000"}}, f"`COUNTDOWN_TASK_{low.upper()}`"),
        ({"text": f"[task]\n{low} = 1000"}, f"`task.{low}` in `{tmp_path}/config.toml`"),
    ):
        error = refused(tmp_path, **layers)
        (tmp_path / "config.toml").unlink(missing_ok=True)
        said = f"{place} = `1000` and `task.{high}` in `config.toml` = `{shipped}`"
        assert error.message == f"`{low}` is larger than `{high}`: {said}"


@pytest.mark.faults
def test_a_fifo_as_a_config_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.toml")
    assert "is not a regular file" in refused(tmp_path).message


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    found = resolved(tmp_path, "runs = '~/runs'\n[model]\nmodel = '~/model'\nref_model = 'a/~b'\n").settings
    assert (found.runs, found.model.model) == ("/home/somebody/runs", "/home/somebody/model")
    assert found.model.ref_model == "a/~b"


def test_every_setting_declares_its_panel_and_whether_a_resumed_run_may_change_it() -> None:
    assert {panel(key) for key in FIELDS} <= set(PANELS)
    settings = resolve().settings
    kept = fixed(settings).keys() - {"suite"}
    assert {"train.learning_rate", "train.seed", "loss.beta", "model.precision", "task.style", "preset"} <= kept
    assert not kept & {"runs", "eval.split", "train.num_iterations", "model.memory", "ranks.shard", "plot.window"}


def test_settings_that_do_not_fit_together_are_one_sentence(tmp_path: Path) -> None:
    problem = refused(tmp_path, flags={"reward.length_penalty": 1.0, "reward.soft_limit": 360})
    assert problem.message.startswith("`soft_limit` must be less than `max_new_tokens`, 360")
    assert not problem.message.endswith(" ") and problem.hint is None


def test_a_switch_is_no_schedule_and_the_form_in_the_hint_is_one(tmp_path: Path) -> None:
    assert refused(tmp_path, flags={"task.operations": "+^"}).hint is None
    problem = refused(tmp_path, flags={"train.prompt_numbers": "3 then 4 after 20 steps"})
    assert "`3 then 4 after 20 steps` is not one of 2, 3, 4, 5, 6" in problem.message
    for line in re.findall("`([^`]*)`", str(problem.hint)):
        assert resolve(flags={"train.prompt_numbers": line}).settings.train.prompt_numbers == line
