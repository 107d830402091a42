"""The command line: registers the commands, and reports errors in one sentence.

A command's module declares it and does it; torch and the core are imported inside the function that needs them, so
help and completion load no model.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time
from types import ModuleType
from typing import Annotated, Any, NoReturn

import typer

from grpo_cli import __version__
from grpo_cli.cli import compare, eval, export, gen_data, plot, runs, solve, study, train, why
from grpo_cli.cli.launch import process_info
from grpo_cli.cli.options import Commands, settings_command
from grpo_cli.core.config.names import nearest
from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import text as show

COMMANDS: dict[str, ModuleType] = {
    "gen-data": gen_data,
    "train": train,
    "eval": eval,
    "solve": solve,
    "plot": plot,
    "why": why,
    "runs": runs,
    "compare": compare,
    "study": study,
    "export": export,
}
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

THREADS_END = 2.0  # seconds that threads of a user's code have to end
USAGE_ERROR: Any = typer.BadParameter.__base__  # Typer does not export it


def main() -> None:
    """Run the command line, and exit even if threads of a user's code are still running."""
    before = threading.enumerate()
    try:
        _run()
    except SystemExit as end:
        deadline = time.monotonic() + THREADS_END
        left = [one for one in threading.enumerate() if one not in before and not one.daemon]
        for one in left:
            one.join(max(0.0, deadline - time.monotonic()))
        if any(one.is_alive() for one in left):
            _exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _exit(code: int) -> NoReturn:
    """Exit without waiting for threads, which Python would do for ever."""
    from multiprocessing import active_children

    for process in active_children():
        process.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> None:
    """Run the command line. A CountdownError is printed as one sentence, without a traceback."""
    show.prepare_streams()
    if sys.platform == "win32":
        show.error(CountdownError("`countdown` runs on Linux and macOS", "on Windows, use it in WSL"))
        sys.exit(2)
    atexit.register(gc.disable)  # skip a slow last collection at interpreter exit
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    _set_environment()
    try:
        show.silence(process_info().rank > 0)
        try:
            sys.exit(app([_with_home(word) for word in sys.argv[1:]], prog_name="countdown", standalone_mode=False))
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


def _set_environment() -> None:
    """Set what libraries read when they are imported; the user's own values win."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors in torch on Linux
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend fails elsewhere, and files need none
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait slow all others down
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by `--deterministic`
    os.environ.setdefault("WANDB_MODE", "offline")  # upload nothing by default
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over within the process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation


def _usage(problem: Any) -> CountdownError:
    """The error for a line that cannot be parsed, with a suggestion for an unknown option."""
    named = [word for word in sys.argv[1:2] if word in COMMANDS]
    command = problem.ctx.command_path if problem.ctx else " ".join(["countdown", *named])
    message, hint = problem.format_message().replace("Value error, ", "").rstrip("."), f"see `{command} --help`"
    if hasattr(problem, "possibilities"):
        names = [name for parameter in problem.ctx.command.get_params(problem.ctx) for name in parameter.opts]
        known = [name for name in names if name.startswith("-")]
        model = problem.option_name in ("--model", "--run")  # a model is named by an argument or by one of these
        meant = next((name for name in ("--model", "--run") if model and name in known), None)
        meant = meant or nearest(problem.option_name, known)
        message = f"`{command}` has no option `{problem.option_name}`"
        hint = f"did you mean `{meant}`?" if meant else hint
        if model and {"models", "runs", "run", "names", "name"} & set(names):
            hint = f"give the name without `{problem.option_name}`; see `{command} --help`"
        if problem.option_name[1:2].isdigit():
            hint = 'a puzzle has positive numbers, as in `countdown solve "4 7 3 = 25"`'
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


def _with_home(word: str) -> str:
    """Expand `~` in a word of the command line: shells do not expand it in `--out=~/x` or in quotes."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return name + equals + os.path.expanduser(value)


for name, module in COMMANDS.items():
    app.command(name, cls=settings_command(*module.SETTINGS))(getattr(module, name.replace("-", "_")))
