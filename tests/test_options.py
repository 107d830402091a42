"""The command line has one option per setting, and hands on what was given."""

import re
from typing import Annotated

import pytest
import typer
from typer.core import TyperCommand
from typer.testing import CliRunner

from grpo_cli.cli.options import flags, settings_command
from grpo_cli.core.config.resolve import flag
from grpo_cli.core.config.settings import FIELDS, choices

EVERYTHING = ("preset", "runs", "task", "model", "train", "loss", "plot")  # [eval] shares names with [train]


def invoke(names: tuple[str, ...], *line: str, width: int = 100) -> tuple[str, dict[str, object]]:
    """What a command with the options of `names` printed, and the flags it was given."""
    app = typer.Typer()
    given: dict[str, object] = {}

    @app.command(cls=settings_command(*names))
    def command(ctx: typer.Context, model: Annotated[str, typer.Argument()] = "own") -> None:
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
    output, _ = invoke(names, "--help", width=width)
    words = output.split()
    keys = [key for key in FIELDS if key in names or key.partition(".")[0] in names]
    assert [key for key in keys if flag(key) not in words] == []
    assert "…" not in output


def test_the_help_shows_panel_default_and_choices() -> None:
    output, _ = invoke(EVERYTHING, "--help", width=140)
    panels = [line.split()[1] for line in output.splitlines() if line.startswith("╭")]
    assert panels[-6:] == ["Model", "Sampling", "Loss", "Optimization", "Schedule", "Output"]
    text = " ".join(output.replace("│", "").split())
    assert "--batch-size <int> prompts per step [default: (4)]" in text
    assert "estimate of the KL; `original` has the other sign: k3, original [default: (k3)]" in text


def test_choices_are_completed() -> None:
    command = settings_command("loss")("x", callback=lambda: None)
    assert isinstance(command, TyperCommand)
    ctx = command.make_context("x", [])
    option = next(param for param in command.params if "--loss-type" in param.opts)
    items = [item.value for item in option.shell_complete(ctx, "d")]
    assert items == [choice for choice in choices("loss.loss_type") if choice.startswith("d")] == ["dapo", "dr_grpo"]
