"""A user's code leaves the process that trains as it was."""

import importlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import Command
from forked import Forked

from grpo_cli.cli.launch import Signals
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task import guest
from grpo_cli.core.task.countdown import Countdown
from grpo_cli.core.task.plugin import load_reward, rewarded
from grpo_cli.core.task.puzzle import Puzzle

P13 = Puzzle((3, 5, 2), 13)
MEAN = """
import os, random, signal, sys, numpy, torch
def mine(text, puzzle):
    os.chdir("/")
    random.seed(0); numpy.random.seed(0); torch.manual_seed(0)
    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_default_device("meta")
    sys.stdout = sys.stderr = None; sys.setrecursionlimit(200); os.umask(0o777)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE): signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.alarm(1)
    return 0.5
"""


def state() -> list[object]:
    torch_defaults = [torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()]
    limits = [sys.getrecursionlimit(), os.umask(os.umask(0o022))]
    return [os.getcwd(), sys.stdout, sys.stderr, *limits, *torch_defaults, *map(signal.getsignal, guest.SIGNALS)]


@pytest.mark.faults
def test_what_a_reward_changes_is_restored(tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(MEAN)
    before = state()
    assert rewarded(Countdown(), f"{tmp_path}/mean.py:mine").score("", P13, style="one-shot").reward == 0.5
    assert state() == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("code", ["sys.stdout.close()", "sys.stderr.close()", "closing(sys.stdout).__exit__()"])
def test_a_reward_cannot_close_the_streams(tmp_path: Path, code: str) -> None:
    (tmp_path / "shut.py").write_text(f"import sys\nfrom contextlib import closing\ndef mine(a, b): {code}; return 1\n")
    rewarded(Countdown(), f"{tmp_path}/shut.py:mine")
    assert not sys.stdout.closed and not sys.stderr.closed


def test_a_users_code_has_the_random_generators_for_itself(tmp_path: Path) -> None:
    text = "import random\nrandom.seed(1)\ndef mine(text, puzzle): return random.random()\n"
    (tmp_path / "own.py").write_text(text)
    drawn, expected = load_reward(f"{tmp_path}/own.py:mine"), random.Random(1)
    assert [guest.call(drawn, "it", "", P13) for _ in range(2)] == [expected.random(), expected.random()]


def test_a_removed_working_directory_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()

    def remove() -> None:
        os.chdir(tmp_path / "gone")
        os.rmdir(tmp_path / "gone")

    here = os.getcwd()
    guest.call(remove, "it")
    assert os.getcwd() == here


@pytest.mark.parametrize("code", ["sys.exit(0)", "exit()", "raise GeneratorExit"])
def test_leaving_is_an_error_of_the_file(tmp_path: Path, code: str) -> None:
    (tmp_path / "leaves.py").write_text(f"import sys\ndef mine(text, puzzle):\n    {code}\n")
    with pytest.raises(CountdownError, match=r"leaves\.py:mine` failed in .*(SystemExit|GeneratorExit)"):
        rewarded(Countdown(), f"{tmp_path}/leaves.py:mine")
    (tmp_path / "leaves_at_once.py").write_text(f"import sys\n{code}\n")
    with pytest.raises(CountdownError, match=r"leaves_at_once\.py` cannot be run: line 2"):
        load_reward(f"{tmp_path}/leaves_at_once.py:mine")


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_during_the_users_code_stops_the_training_and_a_second_one_ends_it(signals: int) -> None:
    """The handler of the first replaces itself, which is undone after the call."""

    def work() -> None:
        with Signals() as control:
            for _ in range(signals):
                guest.call(lambda: os.kill(os.getpid(), signal.SIGTERM), "it")
            assert control.stop == signal.SIGTERM

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == (0 if signals == 1 else -signal.SIGTERM)


def test_ctrl_c_during_the_users_code_is_not_its_error() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guest.call(interrupt, "it")


def test_the_users_code_runs_in_a_thread_too() -> None:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(guest.call(lambda: 1, "it")))
    thread.start()
    thread.join()
    assert results == [1]


@pytest.mark.parametrize(
    "begin",
    [
        "threading.Thread(target=time.sleep, args=(600,)).start()",
        "pool = concurrent.futures.ThreadPoolExecutor(1); pool.submit(time.sleep, 600)",
        "threading.Timer(600, print).start()",
    ],
)
def test_threads_of_the_users_code_do_not_outlive_the_command(tiny_folder: Path, tmp_path: Path, begin: str) -> None:
    code = f"import concurrent.futures, threading, time\n{begin}\ndef mine(text, puzzle): return 0.5\n"
    (tmp_path / "mine.py").write_text(code)
    arguments = ("train", "--dry-run", "--reward", "mine.py:mine", "--model", tiny_folder)
    process = Forked(tmp_path, *arguments, code="from grpo_cli.cli import app; app.THREADS_END = 0.1")
    start = time.monotonic()
    ended, output = process.ended()
    assert ended == 0 and "mine.py" in output and time.monotonic() - start < 60


POOLED = """
import multiprocessing
from dataclasses import dataclass
from helper_of_pooled import half

@dataclass
class Job:
    text: str

def work(job): return half(len(job.text))

def mine(text, puzzle):
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        return sum(pool.map(work, [Job(text[:2]), Job("ab")]))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_helper_beside_the_file_is_imported_and_a_pool_pickles_its_functions(tmp_path: Path, method: str) -> None:
    (tmp_path / "helper_of_pooled.py").write_text("def half(n): return n / 2\n")
    path = tmp_path / f"pooled_{method}.py"
    path.write_text(POOLED.format(method=method))
    reward = load_reward(f"{path}:mine")
    with Signals():  # which pools must not inherit
        assert guest.call(reward, "it", "abc", P13) == 2.0


def test_a_forked_child_has_the_system_s_handlers_so_a_pool_can_end_it_while_it_waits() -> None:
    def default_in_child() -> bool:
        if (child := os.fork()) == 0:
            stopping = {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            os._exit(stopping != {signal.SIG_DFL} or signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN)
        return os.waitpid(child, 0)[1] == 0

    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        own = signal.getsignal(signal.SIGTERM)
        assert default_in_child() and signal.getsignal(signal.SIGTERM) == own != before
    with Signals():
        pass
    assert signal.getsignal(signal.SIGTERM) == before and not default_in_child()  # Ctrl-C raises again


def test_a_file_named_like_an_installed_module_does_not_replace_it(tmp_path: Path) -> None:
    for name in ("random", "markupsafe"):
        (tmp_path / f"{name}.py").write_text("def mine(text, puzzle): return 0.25\n")
        assert guest.call(load_reward(f"{tmp_path}/{name}.py:mine"), "it", "", P13) == 0.25
    for name in ("random", "markupsafe"):
        assert "mine" not in vars(importlib.import_module(name))


@pytest.mark.faults
def test_a_training_is_the_same_whatever_its_reward_changes(
    countdown: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mean2.py").write_text(MEAN.replace("return 0.5", "return len(text) / 1000"))
    (tmp_path / "kind.py").write_text("def mine(text, puzzle): return len(text) / 1000\n")
    small = ["--model", tiny_folder, "--batch-size", 2, "--num-generations", 4, "--max-new-tokens", 12]
    small += ["--num-iterations", 2, "--eval-puzzles", 2]
    for name in ("mean2", "kind"):
        done = countdown("train", "--run", name, "--reward", f"{name}.py:mine", *small)
        assert done.code == 0, done.err
    samples = [(tmp_path / "runs" / name / "samples.jsonl").read_text() for name in ("mean2", "kind")]
    assert samples[0] == samples[1]
