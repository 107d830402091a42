"""One command-line option for every setting, made from the settings themselves.

The options of a command are built when it parses its line or shows its help, so `countdown --help` imports no pydantic.
Values are not checked here: `config.resolve` does that for every layer alike.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

_PANELS = {
    "Model": ("preset", "model"),
    "Sampling": (
        "task",
        "train.batch_size",
        "train.num_generations",
        "train.max_new_tokens",
        "train.temperature",
        "train.seed",
        "train.prompt_style",
        "train.prompt_numbers",
        "train.dynamic_sampling",
        "eval",
    ),
    "Loss": ("loss", "reward"),
    "Optimization": (
        "train.learning_rate",
        "train.schedule",
        "train.warmup_steps",
        "train.num_inner_updates",
        "train.micro_batch_size",
        "train.optimizer",
        "train.weight_decay",
        "train.clip_grad_norm",
    ),
    "Schedule": (
        "train.num_iterations",
        "train.eval_every",
        "train.eval_puzzles",
        "train.eval_suite",
        "train.patience",
        "train.save_every",
        "train.save_minutes",
        "train.keep_last",
        "train.max_bad_steps",
        "train.stop_on_collapse",
    ),
    "Output": ("runs", "plot"),
    "Ranks": ("ranks",),
}
_METAVARS: dict[object, str] = {int: "<int>", float: "<float>"}


def settings_command(*names: str) -> type[TyperCommand]:
    """A command class, for `@app.command(cls=...)`, with an option per setting in `names`: tables or single settings.

    The command reads what was given with `flags(ctx)`. Example: `settings_command("task", "model.device")`.
    """
    return type("SettingsCommand", (_SettingsCommand,), {"names": names})


def flags(ctx: typer.Context) -> dict[str, object]:
    """The setting options given on the command line, keyed `train.batch_size`, as `config.resolve` takes them."""
    return dict(ctx.meta.get(__name__, {}))


def give(ctx: typer.Context, key: str, value: int) -> None:
    """Set a setting as if its option had been given."""
    ctx.meta.setdefault(__name__, {})[key] = str(value)


class _SettingsCommand(TyperCommand):
    names: ClassVar[tuple[str, ...]]
    complete = False

    def make_context(self, *args: Any, **extra: Any) -> Any:
        if not self.complete:
            self.params = [*_options(self.names), *self.params]
            self.complete = True
        return super().make_context(*args, **extra)


def _options(names: tuple[str, ...]) -> list[Any]:
    """The options of `names`, which Typer makes from a function that has them as parameters."""
    from grpo_cli.core.config.resolve import defaults
    from grpo_cli.core.config.settings import FIELDS

    shipped = defaults()
    keys = [(key, panel) for panel, members in _PANELS.items() for key in FIELDS if _named(key, members)]

    def options() -> None: ...

    parameters = [item for key, panel in keys if _named(key, names) for item in _parameters(key, panel, shipped[key])]
    options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(options)
    return typer.main.get_command(app).params


def _named(key: str, names: tuple[str, ...]) -> bool:
    return key in names or key.rpartition(".")[0] in names


def _parameters(key: str, panel: str, default: object) -> Iterator[inspect.Parameter]:
    """The option of a setting; a switch has a second, hidden one that turns it off, which its help names."""
    from grpo_cli.core.config.resolve import flag
    from grpo_cli.core.config.settings import FIELDS, choices, describe

    name, text, kind = flag(key), describe(key), FIELDS[key].annotation
    if kind is bool:
        off = name.replace("--", "--no-")
        yield _parameter(key, name, help=f"{text}; {off} if not", metavar="", rich_help_panel=panel, value=True)
        yield _parameter(key, off, hidden=True, value=False)
        return
    yield _parameter(
        key,
        name,
        help=text,
        metavar=_METAVARS.get(kind, "<name>"),
        show_default=str(default),
        rich_help_panel=panel,
        autocompletion=_completion(choices(key)),
    )


def _parameter(key: str, name: str, *, value: bool | None = None, **shown: Any) -> inspect.Parameter:
    """An option that stores its text, or `value` if it takes none, under `key` where `flags` finds it."""

    def store(ctx: typer.Context, given: str | bool | None) -> None:
        if given is not None:
            ctx.meta.setdefault(__name__, {})[key] = given if value is None else value

    kind = str | None if value is None else bool | None
    return inspect.Parameter(
        f"setting{name.replace('-', '_')}",  # never the name of one of the command's own parameters
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, typer.Option(name, callback=store, expose_value=False, **shown)],
    )


def _completion(listed: tuple[str, ...]) -> Callable[[str], list[str]]:
    return lambda incomplete: [choice for choice in listed if choice.startswith(incomplete)]
