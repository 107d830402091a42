"""The command line has one option per setting, and hands on what was given."""

import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.core import TyperCommand
from typer.testing import CliRunner

from grpo_cli.cli.app import app
from grpo_cli.cli.options import ConfigFile, flags, settings_command
from grpo_cli.core.config.resolve import flag
from grpo_cli.core.config.settings import FIELDS, choices, describe

EVERYTHING = ("preset", "runs", "task", "model", "train", "loss", "plot")  # [eval] shares names with [train]


def invoke(names: tuple[str, ...], *line: str, width: int = 100) -> tuple[str, dict[str, object]]:
    """What a command with the options of `names` printed, and the flags it was given."""
    app = typer.Typer()
    given: dict[str, object] = {}

    @app.command(cls=settings_command(*names))
    def command(ctx: typer.Context, model: Annotated[str, typer.Argument()] = "own", config: ConfigFile = None) -> None:
        given.update(flags(ctx))
        given["own"] = model

    result = CliRunner().invoke(app, list(line), env={"COLUMNS": str(width)})
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output), given


def test_only_what_is_given_is_handed_on() -> None:
    _, given = invoke(EVERYTHING, "--batch-size", "8", "--model", "folder", "--smooth")
    assert given == {"train.batch_size": "8", "model.model": "folder", "plot.smooth": True, "own": "own"}


def test_a_setting_may_share_its_name_with_an_argument() -> None:
    assert invoke(EVERYTHING, "argument", "--model", "option")[1] == {"model.model": "option", "own": "argument"}


def test_values_are_left_for_the_settings_to_check() -> None:
    assert invoke(("train",), "--batch-size", "four")[1]["train.batch_size"] == "four"


def test_a_switch_can_be_turned_off_and_the_last_word_holds() -> None:
    assert invoke(("plot",), "--no-smooth")[1]["plot.smooth"] is False
    assert invoke(("plot",), "--no-smooth", "--window", "3")[1]["plot.smooth"] is False


def test_single_settings_can_be_chosen() -> None:
    output, _ = invoke(("task.style", "model.device"), "--help")
    shown = {key for key in FIELDS if f" {flag(key)} " in output}
    assert shown == {"task.style", "model.device"}


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("names", [EVERYTHING, ("eval",)])
def test_every_setting_is_in_the_help_in_full(names: tuple[str, ...], width: int) -> None:
    output, _ = invoke(names, "--help" if names == ("eval",) else "--help-all", width=width)
    words = output.split()
    keys = [key for key in FIELDS if key in names or key.partition(".")[0] in names]
    assert [key for key in keys if flag(key) not in words] == []
    assert "…" not in output


def test_the_help_shows_panel_default_and_choices() -> None:
    output, _ = invoke(EVERYTHING, "--help-all", width=140)
    panels = [line.split()[1] for line in output.splitlines() if line.startswith("╭")]
    assert panels[-6:] == ["Model", "Sampling", "Loss", "Optimization", "Schedule", "Output"]
    text = " ".join(output.replace("│", "").split())
    assert re.search(r"--batch-size <int> prompts per step \[default: \(\d+\)\]", text)
    assert "where the KL penalty is added: loss, reward [default: (loss)]" in text


def test_choices_are_completed() -> None:
    command = settings_command("loss")("x", callback=lambda: None)
    assert isinstance(command, TyperCommand)
    ctx = command.make_context("x", [])
    option = next(param for param in command.get_params(ctx) if "--loss-type" in param.opts)
    items = [item.value for item in option.shell_complete(ctx, "d")]
    assert items == [choice for choice in choices("loss.loss_type") if choice.startswith("d")] == ["dapo", "dr_grpo"]


def help_text(*line: str) -> str:
    output, _ = invoke(EVERYTHING, *line, "--help-all", width=160)
    return " ".join(output.replace("│", "").split())


def test_the_help_shows_what_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset's values, the file's above them, the environment's above these."""
    monkeypatch.chdir(tmp_path)
    assert "longest completion, in tokens [default: (360)]" in help_text()
    assert "longest completion, in tokens [default: (160)]" in help_text("--preset", "qwen2.5-1.5b")
    Path("mine.toml").write_text("[train]\nbatch_size = 3\n")
    for line in (("--config", "mine.toml"), ("--config=mine.toml",)):
        assert "prompts per step [default: (3)]" in help_text(*line)
    monkeypatch.setenv("COUNTDOWN_TRAIN_BATCH_SIZE", "5")
    assert "prompts per step [default: (5)]" in help_text("--config", "mine.toml")
    Path("mine.toml").write_text("[train\n")
    assert "prompts per step" in help_text("--config", "mine.toml")  # what is wrong with it is said when it is used


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["plot"], ["solve"], ["runs"], ["export"], ["gen-data"]])
def test_the_help_of_a_command_shows_no_type_beside_a_switch_and_brackets_once(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100"}).output
    assert "--help" in shown and "<bool>" not in shown and "[[" not in shown


def test_the_help_of_settings_has_no_markup() -> None:
    text = help_text()
    for key in FIELDS:
        if key.partition(".")[0] in EVERYTHING:
            assert describe(key) in text, key
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        texts = [command.help, *(parameter.help for parameter in command.params if hasattr(parameter, "help"))]
        assert "[" not in "".join(text.replace("\\[", "") for text in texts if text), name
