"""`countdown` in processes of its own, forked with the core imported, which takes longer than a tiny training."""

import multiprocessing
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["grpo_cli.core.rl.build", "transformers.models.qwen2.modeling_qwen2"])


class Forked:
    """`countdown ARGUMENTS` in `folder`, after `code`, with the variables `environ`; killed after two minutes."""

    def __init__(self, folder: Path, *arguments: object, code: str = "", **environ: str) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        given = (folder, [*map(str, arguments)], code, {"OMP_NUM_THREADS": "1", **environ}, writer)
        self.process = CONTEXT.Process(target=_countdown, args=given)
        self.process.start()
        writer.close()
        self.output = os.fdopen(os.dup(reader.fileno()))  # stdout and stderr
        reader.close()
        self._limit = Timer(120, self.process.kill)
        self._limit.start()

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def read_until(self, text: str) -> None:
        """Read the output up to the first line with `text`."""
        while text not in (line := self.output.readline()):
            assert line, "the process ended"

    def ended(self) -> tuple[int, str]:
        """Exit code, and the rest of the output."""
        rest = "" if self.output.closed else self.output.read()
        self.output.close()
        self.process.join()
        self._limit.cancel()
        assert self.process.exitcode is not None
        return self.process.exitcode, rest


def _countdown(
    folder: Path, arguments: list[str], code: str, environ: dict[str, str], output: "Connection[bytes, bytes]"
) -> None:
    os.chdir(folder)
    os.environ.update(environ)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup before the tests would ignore
    exec(code, {})
    vars(import_module("grpo_cli.cli.artifacts"))["draw"] = lambda *_: []
    vars(import_module("grpo_cli.core.perf.utilization"))["MATRIX"] = 64
    sys.argv = ["countdown", *arguments]
    import_module("grpo_cli.cli.app").main()
