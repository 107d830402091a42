"""Make one command-line option for every setting, from its declaration.

Options are built when a command parses its line or shows its help, so `countdown --help` does not import pydantic.
`config.resolve` validates the values of all layers.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer
from typer.core import TyperCommand, TyperGroup

PANELS = ("Model", "Sampling", "Loss", "Optimization", "Schedule", "Output", "Ranks")
_METAVARS: dict[object, str] = {int: "<int>", float: "<float>"}
_COMPLETED: dict[str, Any] = {
    "preset": "preset",
    "train.eval_suite": "suite",
    "model.model": "model",
    "model.ref_model": "model",
}
_HELP = {"-h", "--help"}
_NEGATIVE = re.compile(r"-[0-9].*[\s=]")  # a puzzle that begins with a negative number is not an option


def settings_command(*names: str) -> type[TyperCommand]:
    """A command class, for `@app.command(cls=...)`, with an option per setting in `names`: tables or single settings.

    The command reads the options with `flags(ctx)`. Example: `settings_command("task", "model.device")`.
    """
    return type("SettingsCommand", (_SettingsCommand,), {"names": names})


def flags(ctx: typer.Context) -> dict[str, object]:
    """The setting options of the command line, keyed `train.batch_size`, for `config.resolve`."""
    return dict(ctx.meta.get(__name__, {}))


def give(ctx: typer.Context, key: str, value: int) -> None:
    """Set a setting as if its option had been given."""
    ctx.meta.setdefault(__name__, {})[key] = str(value)


def completion(kind: Literal["run", "model", "preset", "suite"]) -> Callable[[typer.Context], list[str]]:
    """An `autocompletion` of existing names, using the settings file and `--runs` of the line typed so far."""

    def names(ctx: typer.Context) -> list[str]:
        from grpo_cli.core.config.resolve import presets, resolve
        from grpo_cli.core.errors import CountdownError
        from grpo_cli.core.run.folder import list_runs

        place = {key: value for key, value in flags(ctx).items() if key == "runs"}
        file = Path(os.path.expanduser(given)) if (given := ctx.params.get("config")) else None
        try:
            if kind == "preset":
                return ["auto", *sorted(presets(file))]
            settings = resolve(flags=place, environ=os.environ, config_file=file).settings
        except CountdownError:  # an incomplete line may be invalid
            return []
        if kind == "suite":
            return [*settings.suite]
        runs = [run.name for run in list_runs(Path(os.path.expanduser(settings.runs)))]
        return ["builtin", *runs] if kind == "model" else runs

    return names


class _SettingsCommand(TyperCommand):
    names: ClassVar[tuple[str, ...]]
    complete = False

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        args = [f" {argument}" if _NEGATIVE.match(argument) else argument for argument in args]
        if not self.complete:
            own = [_without_type(parameter) for parameter in self.params]
            self.params = [*_options(self.names, args), *own]
            self.complete = True
        return super().make_context(info_name, args, *rest, **extra)

    def get_params(self, ctx: Any) -> list[Any]:
        return [_without_type(parameter) for parameter in super().get_params(ctx)]  # including --help


class Commands(TyperGroup):
    """All commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [_without_type(parameter) for parameter in super().get_params(ctx)]


def _without_type(parameter: Any) -> Any:
    """Show no type beside a switch."""
    if getattr(parameter, "is_flag", False):
        parameter.metavar = " "
    return parameter


def _options(names: tuple[str, ...], args: Sequence[str]) -> list[Any]:
    """The options of `names`, made by Typer from a function with these parameters."""
    from grpo_cli.core.config.resolve import defaults
    from grpo_cli.core.config.settings import FIELDS, panel

    shown = _values(args) if _HELP & set(args) else defaults()
    keys = sorted((key for key in FIELDS if _named(key, names)), key=lambda key: PANELS.index(panel(key)))

    def options() -> None: ...

    parameters = [parameter for key in keys for parameter in _parameters(key, panel(key), shown[key])]
    options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(options)
    return typer.main.get_command(app).params


def _values(args: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Every setting with its value from the chosen preset, the user's file and the environment.

    Help does not import torch, so the driver's device file indicates CUDA. Errors in a file are reported when it is
    used.
    """
    from grpo_cli.core.config.resolve import defaults, resolve
    from grpo_cli.core.config.settings import values
    from grpo_cli.core.errors import CountdownError

    def given(name: str) -> str | None:
        return next(
            (
                argument.partition("=")[2] or following
                for argument, following in zip(args, [*args[1:], ""], strict=True)
                if argument == name or argument.startswith(f"{name}=")
            ),
            None,
        )

    preset, file = given("--preset"), given("--config")
    has_cuda = Path("/dev/nvidiactl").exists() and environ.get("CUDA_VISIBLE_DEVICES") != ""
    try:
        resolved = resolve(
            flags={"preset": preset} if preset else {},
            environ=environ,
            config_file=Path(os.path.expanduser(file)) if file else None,
            has_cuda=lambda: has_cuda,
        )
    except CountdownError:
        return defaults()
    return values(resolved.settings)


def _named(key: str, names: tuple[str, ...]) -> bool:
    return key in names or key.rpartition(".")[0] in names


def _parameters(key: str, panel: str, default: object) -> Iterator[inspect.Parameter]:
    """The option of a setting; a switch has a second, hidden option that turns it off, named in its help."""
    from grpo_cli.core.config.resolve import flag
    from grpo_cli.core.config.settings import FIELDS, choices, describe

    name, text, kind = flag(key), describe(key).replace("[", "\\["), FIELDS[key].annotation  # no markup
    if kind is bool:
        off = name.replace("--", "--no-")
        state = f"; on, {off} turns it off" if default else ""
        yield _parameter(key, name, help=text + state, rich_help_panel=panel, value=True)
        yield _parameter(key, off, hidden=True, value=False)
        return
    yield _parameter(
        key,
        name,
        help=text,
        metavar=_METAVARS.get(kind, "<name>"),
        show_default=str(default),
        rich_help_panel=panel,
        autocompletion=completion(_COMPLETED[key]) if key in _COMPLETED else lambda: [*choices(key)],
    )


def _parameter(key: str, name: str, *, value: bool | None = None, **shown: Any) -> inspect.Parameter:
    """An option that stores its text, or `value` if it takes none, under `key` for `flags`."""

    def store(ctx: typer.Context, given: str | bool | None) -> None:
        if given is not None:
            ctx.meta.setdefault(__name__, {})[key] = given if value is None else value

    kind = str | None if value is None else bool | None
    return inspect.Parameter(
        f"setting{name.replace('-', '_')}",  # differs from the command's own parameters
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, typer.Option(name, callback=store, expose_value=False, **shown)],
    )
