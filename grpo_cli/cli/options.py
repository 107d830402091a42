"""The options of commands: one for every setting, made from its declaration, and the settings that they give.

Options are made when a command parses its line or shows its help, so `countdown --help` does not import pydantic.
`config.resolve` validates the values of all layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer
from typer._coercion import resolve_type_descriptor
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.models import OptionInfo

from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import text as show

if TYPE_CHECKING:
    from grpo_cli.core.config.resolve import Resolved
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.task.task import Task

PANELS = ("Model", "Sampling", "Loss", "Optimization", "Schedule", "Output", "Ranks")
MANY = 40  # settings from which a command hides its advanced ones
_METAVARS: dict[object, str] = {int: "<int>", float: "<float>"}
_COMPLETED: dict[str, Any] = {
    "preset": "preset",
    "train.eval_suite": "suite",
    "model.model": "model",
    "model.ref_model": "model",
}
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either of them in WSL
_TEXT = resolve_type_descriptor(annotation=str, parameter_info=OptionInfo())

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="settings file; default: ./config.toml", metavar="<file>", is_eager=True),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace existing output")]


def resolve(
    ctx: typer.Context,
    config_file: Path | None,
    given: Mapping[str, object] | None = None,
    *,
    at_most: Sequence[str] | None = None,
) -> Resolved:
    """The settings of this invocation; `given` settings, by key, replace its flags, of which only some may count.

    The preset may depend on whether there is a GPU: torch is imported to find out if there is a driver.
    """
    from grpo_cli.core.config.resolve import resolve

    counted = {key: value for key, value in flags(ctx).items() if at_most is None or key in at_most}
    replaced = counted | dict(given or {})
    return resolve(flags=replaced, environ=os.environ, config_file=config_file, has_cuda=_has_cuda)


def _has_cuda() -> bool:
    if not _has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def _has_driver() -> bool:
    return any(map(os.path.exists, _GPU_DRIVERS)) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def require_package(package: str, hint: str = "install `countdown-grpo` again, with all it needs") -> None:
    """Raise CountdownError if a package that is imported later is missing."""
    if find_spec(package) is None:
        raise CountdownError(f"the package `{package}` is not installed", hint)


def require_engine(settings: Settings) -> None:
    """Raise CountdownError if what samples completions is not installed, or no server."""
    model = settings.model
    if model.rollout == "vllm" and model.vllm_url != "none":
        from grpo_cli.core.model.load import detect_device, detect_precision, find
        from grpo_cli.core.rollout.vllm_server import require_server
        from grpo_cli.core.run.models import model_source

        if model.vllm_folder != "none" and not Path(model.vllm_folder).is_dir():
            raise CountdownError(f"there is no folder `{model.vllm_folder}`", f"mkdir -p {model.vllm_folder}")
        precision = detect_precision(model.precision, detect_device(model.device))
        source, _ = find(model_source(Path(settings.runs), model.model))
        require_server(model.vllm_url, source, dtype="float32" if precision == "float32" else "bfloat16")
    elif model.rollout == "vllm":
        require_package("vllm", "pip install 'countdown-grpo[vllm]'; on a CPU see docs/gpus.md")


def read_files(settings: Settings) -> Task:
    """The task of the settings, with its puzzle files read and its code files run."""
    from grpo_cli.core.task.countdown import task_of

    for path in (settings.task.task, settings.reward.reward.rpartition(":")[0]):
        if path.endswith(".py") and Path(path).is_file():
            show.note(f"running `{path}`")
    task = task_of(settings)
    _ = task.files
    return task


def flags(ctx: typer.Context) -> dict[str, object]:
    """The setting options of the command line, keyed `train.batch_size`, for `config.resolve`."""
    return dict(ctx.meta.get(__name__, {}))


def settings_command(*names: str) -> type[TyperCommand]:
    """A command class, for `@app.command(cls=...)`, with an option per setting in `names`: tables or single settings.

    The command reads the options with `flags(ctx)`. Example: `settings_command("task", "model.device")`.
    """
    return type("SettingsCommand", (_SettingsCommand,), {"names": names})


class Commands(TyperGroup):
    """All commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_type(super().get_params(ctx))


class _SettingsCommand(TyperCommand):
    names: ClassVar[tuple[str, ...]]
    _made: list[Any] | None = None
    shows_all = False

    def get_params(self, ctx: Any) -> list[Any]:
        if self._made is None:
            self._made = list(_options(self.names))
        return _without_type([*self._made, *super().get_params(ctx)])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._made = list(_options(self.names, _values(ctx), shows_all=self.shows_all))
        super().format_help(ctx, formatter)


def _without_type(parameters: Sequence[Any]) -> list[Any]:
    """Show no type beside a switch."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = " "
    return list(parameters)


def _help_all(ctx: Any, _: object, asked: bool | None) -> None:
    """Show the help with the advanced settings too, and exit."""
    if asked:
        ctx.command.shows_all = True
        ctx.get_help()
        raise typer.Exit


def _options(
    names: Sequence[str], shown: Mapping[str, object] | None = None, *, shows_all: bool = False
) -> Iterator[TyperOption]:
    """The options of `names`, with the values `shown` in the help; advanced ones are hidden if there are many."""
    from grpo_cli.core.config.resolve import defaults, flag
    from grpo_cli.core.config.settings import FIELDS, choices, describe, is_common, panel

    values = shown or defaults()
    keys = sorted(
        (key for key in FIELDS if key in names or key.rpartition(".")[0] in names),
        key=lambda key: PANELS.index(panel(key)),
    )
    hides = len(keys) >= MANY and not shows_all
    for key in keys:
        name, kind, hidden = flag(key), FIELDS[key].annotation, hides and not is_common(key)
        text = describe(key).replace("[", "\\[")  # no markup
        look: dict[str, Any] = {"rich_help_panel": panel(key), "hidden": hidden}
        if kind is bool:
            off = name.replace("--", "--no-")
            state = f"; on, {off} turns it off" if values[key] else ""
            yield _option(key, name, help=text + state, stored=True, **look)
            yield _option(key, off, hidden=True, stored=False)
            continue
        yield _option(
            key,
            name,
            help=text,
            metavar=_METAVARS.get(kind, "<name>"),
            show_default=str(values[key]),
            autocompletion=_completed(key, choices(key)),
            **look,
        )
    if hides or shows_all:
        yield TyperOption(
            param_decls=["help_all", "--help-all"],
            type_descriptor=_TEXT,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_help_all,
            help="show this with the advanced settings too, and exit",
        )


def _option(key: str, name: str, *, stored: bool | None = None, **look: Any) -> TyperOption:
    """An option that stores its text, or `stored` if it is a switch, under `key` for `flags`."""

    def store(ctx: typer.Context, _: object, given: str | bool | None) -> None:
        if given is not None:
            ctx.meta.setdefault(__name__, {})[key] = given if stored is None else stored

    declared = [f"setting{name.replace('-', '_')}", name]  # differs from the command's own parameters
    return TyperOption(
        param_decls=declared,
        type_descriptor=_TEXT,
        is_flag=stored is not None,
        is_eager=key == "preset",  # the help shows its values
        callback=store,
        expose_value=False,
        **look,
    )


def _completed(key: str, choices: Sequence[str]) -> Callable[[Any, Any, str], list[str]]:
    """Completes existing names, or the choices of a setting."""
    names = completion(_COMPLETED[key]) if key in _COMPLETED else lambda _: [*choices]
    return lambda ctx, _, __: names(ctx)


def completion(kind: Literal["run", "model", "preset", "suite"]) -> Callable[[typer.Context], list[str]]:
    """An `autocompletion` of existing names, using the settings file and `--runs` of the line typed so far."""

    def names(ctx: typer.Context) -> list[str]:
        from grpo_cli.core.config.resolve import presets, resolve
        from grpo_cli.core.run.folder import list_runs

        place = {key: value for key, value in flags(ctx).items() if key == "runs"}
        try:
            if kind == "preset":
                return ["auto", *sorted(presets(_file(ctx)))]
            settings = resolve(flags=place, environ=os.environ, config_file=_file(ctx)).settings
        except CountdownError:  # an incomplete line may be invalid
            return []
        if kind == "suite":
            return [*settings.suite]
        runs = [run.name for run in list_runs(Path(os.path.expanduser(settings.runs)))]
        return ["builtin", *runs] if kind == "model" else runs

    return names


def _values(ctx: typer.Context) -> dict[str, object]:
    """Every setting with the value that would run: the preset and the settings file before `--help` are known by then.

    Help does not import torch: a driver indicates CUDA. Errors in a file are reported when it is used.
    """
    from grpo_cli.core.config.resolve import defaults, resolve
    from grpo_cli.core.config.settings import values

    try:
        return values(
            resolve(flags=flags(ctx), environ=os.environ, config_file=_file(ctx), has_cuda=_has_driver).settings
        )
    except CountdownError:
        return defaults()


def _file(ctx: typer.Context) -> Path | None:
    """The settings file of the line typed so far."""
    return Path(os.path.expanduser(given)) if (given := ctx.params.get("config")) else None
