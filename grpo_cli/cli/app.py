"""The command line: declares every command and its flags, and reports errors in one sentence.

Declarations live here so that help and completion load no model. Calling a command imports the module of its name in
this package and calls its `run` with the same parameters.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grpo_cli import __version__
from grpo_cli.cli.launch import place
from grpo_cli.cli.options import Commands, completion, settings_command
from grpo_cli.core.config.names import nearest
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.rules import Rules
from grpo_cli.ui import text as show

RULES = [f"task.{rule.name}" for rule in fields(Rules)]
PLACES = ("config", "out", "folder", "model", "models", "run", "runs", "name")  # options whose `~` is expanded

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USAGE_ERROR: Any = typer.BadParameter.__base__  # Typer does not export it

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="settings file; default: ./config.toml", metavar="<file>")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace existing output")]


def main() -> None:
    """Run the command line. A CountdownError is printed as one sentence, without a traceback."""
    show.prepare_streams()
    atexit.register(gc.disable)  # skip a slow last collection at interpreter exit
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors in torch on Linux
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by `--deterministic`
    os.environ.setdefault("WANDB_MODE", "offline")  # upload nothing by default
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
    try:
        show.silence(place().rank > 0)
        try:
            sys.exit(app(prog_name="countdown", standalone_mode=False))
        finally:
            sys.stdout.flush()  # flush before exit so that a closed pipe is handled
    except USAGE_ERROR as problem:
        if problem.format_message():  # empty if the help was shown
            show.error(_usage(problem))
        sys.exit(2)
    except typer.Abort:  # Ctrl-C or end of input at a prompt
        show.note("\nnothing was changed")
        sys.exit(1)
    except CountdownError as problem:
        if getattr(problem, "reports", False):
            show.silence(False)
        show.error(problem)
        sys.exit(problem.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe: exit silently
        sys.exit(1)
    except ImportError as problem:
        show.error(CountdownError(f"a package cannot be loaded: {problem}", "install `countdown-grpo` again"))
        sys.exit(1)
    except OSError as problem:
        what = problem.strerror or str(problem)
        show.error(CountdownError(f"{what}: `{problem.filename}`" if problem.filename else what))
        sys.exit(1)


def _usage(problem: Any) -> CountdownError:
    """The error for a line that cannot be parsed, with a suggestion for an unknown option."""
    command = problem.ctx.command_path if problem.ctx else "countdown"
    message, hint = problem.format_message().replace("Value error, ", "").rstrip("."), f"see `{command} --help`"
    if hasattr(problem, "possibilities"):
        known = [name for parameter in problem.ctx.command.params for name in parameter.opts]
        meant = nearest(problem.option_name, known)
        message = f"`{command}` has no option `{problem.option_name}`"
        hint = f"did you mean `{meant}`?" if meant else hint
    return CountdownError(message[:1].lower() + message[1:], hint)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="show the version and exit", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Teach a language model to solve countdown puzzles with GRPO."""


def _command(*settings: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a command with an option for each of `settings`: tables of them, or single ones."""

    def register(declared: Callable[..., None]) -> Callable[..., None]:
        @wraps(declared)
        def call(*args: Any, **given: Any) -> None:
            options = {name: _at_home(value) if name in PLACES else value for name, value in given.items()}
            with _uncollected():
                if declared.__name__ in ("train", "eval", "solve"):
                    checks = import_module("grpo_cli.cli.checks")
                    checks.require_models(options)
                    getattr(checks, f"check_{declared.__name__}")(options)
                command = import_module(f"grpo_cli.cli.{declared.__name__}")
            command.run(*args, **options)

        app.command(name, cls=settings_command(*settings))(call)
        return declared

    return register


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause garbage collection: it takes a third of the time of importing torch and transformers."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _at_home(value: Any) -> Any:
    """Expand `~` in a path or a list of paths: shells do not expand it in `--out=~/x` or in quotes."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


@_command("task.numbers", *RULES, name="gen-data")
def gen_data(
    ctx: typer.Context,
    split: Annotated[Literal["train", "val"] | None, typer.Option(help="write only this split; default: both")] = None,
    count: Annotated[
        int, typer.Option(min=0, help="number of puzzles to sample; 0 enumerates all", metavar="<int>")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="random seed", metavar="<int>")] = 0,
    out: Annotated[Path | None, typer.Option(help="file to write; default: stdout", metavar="<file>")] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Write puzzles with solutions as JSON Lines, CSV or Parquet, by the file's extension.

    Example: countdown gen-data --split val --out val.jsonl
    """


@_command("preset", "runs", "task", "model", "train", "loss", "reward", "ranks")
def train(
    ctx: typer.Context,
    run: Annotated[
        str | None,
        typer.Option(
            help="name of the run; default: run-1, run-2, ...", metavar="<name>", autocompletion=completion("run")
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue --run from its last checkpoint")] = False,
    step: Annotated[
        int | None, typer.Option(min=1, help="with --resume: continue from this checkpoint", metavar="<int>")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show all settings, a prompt and the memory plan; do not train")
    ] = False,
    batch_size_per_rank: Annotated[
        int | None,
        typer.Option(min=1, help="prompts per step and process under torchrun; replaces --batch-size", metavar="<int>"),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="sample the starting model and estimate what it can learn; do not train")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Train a model with GRPO.

    Ctrl-C saves a checkpoint and stops; SIGUSR1 saves one and continues.

    Example: countdown train --run first --num-iterations 100
    """


@_command("preset", "runs", "task", "model.device", "model.precision", "eval", "ranks")
def eval(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL", help="runs, folders, hub ids, or `builtin`", autocompletion=completion("model")
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="evaluate on every cell of this suite, a table `suite.NAME` of the settings",
            metavar="<name>",
            autocompletion=completion("suite"),
        ),
    ] = None,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown tables, for a report")] = False,
    out: Annotated[
        Path | None, typer.Option(help="write every completion to this file, as JSON Lines", metavar="<file>")
    ] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Measure accuracy on all val puzzles; by default of the newest run's best model.

    Several models are evaluated with the settings of the first, and compared with it puzzle by puzzle. With --suite,
    --limit counts puzzles per cell. Example: countdown eval builtin first --suite transfer
    """


@_command(
    "preset", "runs", "task.style", *RULES, "model.device", "model.precision", "eval.max_new_tokens", "eval.temperature"
)
def solve(
    ctx: typer.Context,
    question: Annotated[list[str], typer.Argument(metavar="PUZZLE", help='"4 7 3 = 25", "4,7,3 -> 25", or a sentence')],
    model: Annotated[
        str | None,
        typer.Option(help="run, folder, hub id, or `builtin`", metavar="<name>", autocompletion=completion("model")),
    ] = None,
    attempts: Annotated[
        int, typer.Option(min=1, help="completions to sample until one is correct", metavar="<int>")
    ] = 1,
    show_solution: Annotated[bool, typer.Option("--show-solution", help="show the solver's own solutions too")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Ask a model a puzzle; by default the newest run's best model.

    The first attempt is greedy, later ones are sampled. Example: countdown solve "4 7 3 = 25"
    """


@_command("runs", "plot")
def plot(
    ctx: typer.Context,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="runs, or metrics files; default: the newest run", autocompletion=completion("run")
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="output folder; default: the run's, or plots/ for several runs", metavar="<folder>"),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="write report.html too, one page about the run")] = False,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Draw the training curve and the KL curve, of one run or of several overlaid.

    Example: countdown plot first second --smooth --report
    """


@_command("runs", name="runs")
def runs(
    ctx: typer.Context,
    delete: Annotated[
        list[str] | None,
        typer.Option(
            "--delete", help="run to delete; may be repeated", metavar="<name>", autocompletion=completion("run")
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete without asking")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """List the runs: model, steps, accuracy of base and best model, time, settings that differ from the preset.

    Example: countdown runs --delete run-1
    """


@_command("runs")
def export(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="RUN", help="run whose best model to export", autocompletion=completion("run"))
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="merge a LoRA adapter into its base model")] = False,
    gguf: Annotated[
        Literal["f16", "f32"] | None, typer.Option(help="add a GGUF file, with matrices of this type")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="upload the folder to this repository of the hub", metavar="<owner/name>")
    ] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Write a run's best model and its model card to a folder in Hugging Face format.

    Nothing is uploaded without --push. Example: countdown export first shared/first
    """
