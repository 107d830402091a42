"""Several processes are one experiment: the same prompts, completions, gradients and files as one process has."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, run_here
from forked import Forked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_cli.cli.launch import ProcessInfo, process_info
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.world import World

ROOT = Path(__file__).parent.parent
TRAIN = [*SMALL, "--device", "cpu", "--num-iterations", "3", "--batch-size", "3"]


def launched(
    folder: Path, ranks: int, *arguments: object, plugin: str = "", torchrun: list[str] | None = None
) -> subprocess.Popen[str]:
    """`countdown ARGUMENTS` under torchrun in `folder`; each process first runs the lines of `plugin`."""
    script = folder / "start.py"
    script.write_text(
        f"import os\nrank = int(os.environ['RANK'])\n{plugin}\nfrom grpo_cli.cli.app import main\nmain()\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("COUNTDOWN_")}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*start, *(torchrun or []), "--", str(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def forked(folder: Path, ranks: int, *arguments: object, plugin: str = "") -> tuple[list[int], str]:
    """Exit codes and outputs of ranks that no launcher watches."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        Forked(folder, *arguments, code=f"import os\nrank = {rank}\n{plugin}", RANK=str(rank), LOCAL_RANK="0", **shared)
        for rank in range(ranks)
    ]
    outcomes = [process.ended() for process in started]
    return [code for code, _ in outcomes], "".join(output for _, output in outcomes)


def by_one(folder: Path, *arguments: object) -> str:
    """What `countdown ARGUMENTS` prints in `folder`, by one process without torchrun."""
    command = [sys.executable, "-m", "grpo_cli", *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True).stdout


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(line: Mapping[str, float]) -> dict[str, float]:
    """What a line of metrics says of the experiment, not of the machine."""
    machine = ("time/", "tokens_per_second", "mfu", "padding", "peak_memory")
    return {key: value for key, value in line.items() if not key.startswith(machine)}


def same_experiment(one: Path, other: Path, *, tolerance: float = 1e-4) -> None:
    assert rows(one / "samples.jsonl") == rows(other / "samples.jsonl")
    assert rows(one / "evaluations.jsonl") == rows(other / "evaluations.jsonl")
    mine, theirs = (list(map(untimed, rows(folder / "metrics.jsonl"))) for folder in (one, other))
    assert [list(line) for line in mine] == [list(line) for line in theirs]
    for line, same in zip(mine, theirs, strict=True):
        assert same == pytest.approx(line, rel=tolerance, abs=1e-6)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, in three steps."""
    folder = tmp_path_factory.mktemp("alone")
    run_here(folder, "train", "--model", tiny_folder, "--run", "one", *TRAIN)
    return folder / "runs" / "one"


@pytest.mark.parametrize(
    ("count", "size", "shares"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (1, 3, [1, 0, 0]), (7, 3, [3, 2, 2])]
)
def test_shares_are_even_whole_and_in_order(count: int, size: int, shares: list[int]) -> None:
    parts = [World(rank, size).share(count) for rank in range(size)]
    assert sorted(map(len, parts), reverse=True) == sorted(shares, reverse=True) and len(parts[0]) == max(shares)
    assert [index for part in parts for index in part] == list(range(count))


def test_a_launcher_is_known_by_its_environment() -> None:
    torchrun = {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "TORCHELASTIC_RESTART_COUNT": "2",
    }  # fmt: skip
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    assert process_info(torchrun) == ProcessInfo(3, 8, 1, restarts=2)
    assert process_info(slurm) == process_info({}) == ProcessInfo()
    assert process_info(slurm | {"MASTER_ADDR": "node1"}) == ProcessInfo(5, 16, 1)
    with pytest.raises(CountdownError, match="RANK=x"):
        process_info(torchrun | {"RANK": "x"})
    with pytest.raises(CountdownError, match="a rank 3 among 3 processes"):
        process_info(torchrun | {"WORLD_SIZE": "3"})


def test_one_process_sums_and_gathers_nothing() -> None:
    world, weight = World(), torch.nn.Parameter(torch.ones(2))
    world.sum_gradients([weight])
    assert weight.grad is None and world.gather("own") == ["own"] and world.lap() == {}


def test_gradients_are_summed_by_dtype_and_a_missing_one_counts_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of equal gradients: the all-reduce doubles."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in SHAPES]
    weights[0].grad, weights[1].grad = torch.full((2, 3), 0.5), torch.full((4,), 3.0, dtype=torch.bfloat16)
    World(0, 2).sum_gradients(weights)
    assert [weight.grad.unique().tolist() for weight in weights if weight.grad is not None] == [[1.0], [6.0], [0.0]]


SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((2, 3), torch.float32), ((4,), torch.bfloat16), ((5,), torch.float32),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_follow_the_curve_of_one(ranks: int, tiny_folder: Path, tmp_path: Path, alone: Path) -> None:
    """Three prompts by two processes, or by four of which one has none."""
    code, _, err = ended(launched(tmp_path, ranks, "train", "--model", tiny_folder, "--run", "two", *TRAIN))
    assert code == 0, err
    same_experiment(alone, tmp_path / "runs" / "two")
    lines = rows(tmp_path / "runs" / "two" / "metrics.jsonl")[1:]
    assert all(line["time/wait"] > 0 and line["time/reduce"] > 0 for line in lines)
    assert err.count("step 2 of 3") == 1  # one of them has the view
    assert not (tmp_path / "runs" / "two" / "bad_steps").exists()


@pytest.mark.slow
def test_several_processes_train_the_adapter_that_one_trains(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "own.py").write_text("def length(completion, puzzle):\n    return len(completion) % 7")
    arguments = ["train", "--model", tiny_folder, *TRAIN, "--lora-rank", "4", "--learning-rate", "0.01"]
    arguments += ["--reward", "own.py:length", "--run"]
    by_one(tmp_path, *arguments, "one")
    code, _, err = ended(launched(tmp_path, 2, *arguments, "two"))
    assert code == 0, err
    same_experiment(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    one, two = (load_file(tmp_path / "runs" / run / "adapter/adapter_model.safetensors") for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_evaluation_is_dealt_out(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ["eval", tiny_folder, "--device", "cpu", "--precision", "float32", "--limit", 7, "--json"]
    asked += ["--max-new-tokens", 8]
    alone = by_one(tmp_path, *asked)
    code, out, err = ended(launched(tmp_path, 2, *asked))
    assert code == 0, err
    assert json.loads(out) == json.loads(alone)


# Each plugin changes what one rank does, as a fault would.
NAN = """
if rank == 1:
    from grpo_cli.core.rl import update
    plain, calls = update.batch_loss, []
    def broken(*args):
        calls.append(1)
        total, tokens = plain(*args)
        return (total * float("nan") if len(calls) == 2 else total), tokens
    update.batch_loss = broken
"""
NAN_BACKWARD = NAN.replace(
    'return (total * float("nan") if len(calls) == 2 else total)',
    'if len(calls) == 2: total.register_hook(lambda gradient: gradient * float("nan"))\n        return total',
)
RAISES = """
if rank == 1:
    from grpo_cli.core.rl.collect import Collector
    plain, calls = Collector._score, []
    def broken(*args, **given):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of luck")
        return plain(*args, **given)
    Collector._score = broken
"""
DIES = RAISES.replace('raise RuntimeError("out of luck")', "os.kill(os.getpid(), 9)")
HANGS = RAISES.replace('raise RuntimeError("out of luck")', "import time; time.sleep(100)")
LATE = """
if rank == 1:
    import torch
    from grpo_cli.core.rl import update
    backward, calls = update._backward, []
    def limited(*given):
        sums = backward(*given)
        calls.append(print("memory ran out", flush=True) if not calls else None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return sums
    update._backward = limited
"""
SLOW = """
import time
from grpo_cli.core.rl.collect import Collector
plain = Collector._score
def slow(*args, **given):
    print("scoring", flush=True)
    time.sleep(0.3)
    return plain(*args, **given)
Collector._score = slow
"""
LONG = [*TRAIN, "--batch-size", "2", "--num-iterations", "30", "--eval-every", "30"]


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "problem"),
    [(NAN, "the loss is not finite"), (NAN_BACKWARD, "the gradient norm is not finite")],
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(
    plugin: str, problem: str, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--model", tiny_folder, "--run", "two", *TRAIN, "--batch-size", "4"]
    code, _, err = ended(launched(tmp_path, 2, *arguments, plugin=plugin))
    assert code == 0, err
    lines = rows(tmp_path / "runs" / "two" / "metrics.jsonl")
    assert [line["bad_steps"] for line in lines[1:]] == [0, 1, 1]
    assert err.count(f"step 2: {problem}; the weights are unchanged") == 1
    assert [path.name for path in (tmp_path / "runs" / "two" / "bad_steps").iterdir()] == ["step-2.json"]


@pytest.mark.faults
def test_memory_that_runs_out_on_one_rank_changes_nothing(tiny_folder: Path, tmp_path: Path, alone: Path) -> None:
    codes, output = forked(tmp_path, 2, "train", "--model", tiny_folder, "--run", "two", *TRAIN, plugin=LATE)
    assert codes == [0, 0], output
    assert "memory ran out" in output
    same_experiment(alone, tmp_path / "runs" / "two")
    lines = rows(tmp_path / "runs" / "two" / "metrics.jsonl")[1:]
    assert all(line["time/wait"] > 0 and line["time/reduce"] > 0 for line in lines)
    assert output.count("step 2 of 3") == 1  # one rank shows the progress


@pytest.mark.faults
def test_a_rank_that_is_killed_stops_the_other_with_one_message(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["train", "--model", tiny_folder, "--run", "two", *LONG, "--timeout", "6"]
    codes, output = forked(tmp_path, 2, *arguments, plugin=DIES)
    assert codes == [1, -signal.SIGKILL], output
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert error.startswith("error: rank 0 of 2: the other ranks no longer answer")
    assert [path.name for path in (tmp_path / "runs" / "two" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "sentence"),
    [
        (RAISES, "error: rank 1 of 2: out of luck"),
        (DIES, "error: rank 0 of 2: the other ranks no longer answer"),
        (HANGS, "error: rank 0 of 2: the other ranks no longer answer"),
    ],
)
def test_a_rank_that_fails_stops_all_with_one_message(
    plugin: str, sentence: str, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--model", tiny_folder, "--run", "two", *LONG, "--timeout", "6"]
    code, _, err = ended(launched(tmp_path, 2, *arguments, plugin=plugin, torchrun=["--shutdown-timeout=3"]))
    assert code == 1
    assert err.count(sentence) == 1, err
    assert [line for line in err.splitlines() if line.startswith("error:")] == [
        line for line in err.splitlines() if line.startswith(sentence)
    ]
    run = tmp_path / "runs" / "two"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.faults
@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_once_and_one_process_goes_on(
    tiny_folder: Path, tmp_path: Path, alone: Path
) -> None:
    run = tmp_path / "runs" / "two"
    arguments = ["train", "--model", tiny_folder, "--run", "two", *TRAIN, "--save-every", "3"]
    process = launched(tmp_path, 2, *arguments, plugin=SLOW)
    wait_for(lambda: len(rows(run / "metrics.jsonl")) > 1 if (run / "metrics.jsonl").exists() else False)
    process.send_signal(signal.SIGTERM)
    _, _, err = ended(process)
    (saved,) = (run / "checkpoints").iterdir()
    assert f"stopped after step {saved.name.removeprefix('step-')}" in err
    by_one(tmp_path, "train", "--run", "two", "--resume")
    same_experiment(alone, run)


@pytest.mark.faults
@pytest.mark.slow
def test_a_restart_by_the_launcher_goes_on_by_itself(tiny_folder: Path, tmp_path: Path, alone: Path) -> None:
    dies_once = DIES.replace("rank == 1:", "rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':")
    arguments = ["train", "--model", tiny_folder, "--run", "two", *TRAIN, "--timeout", "6"]
    restarts = ["--max-restarts=1", "--shutdown-timeout=3"]
    code, _, err = ended(launched(tmp_path, 2, *arguments, plugin=dies_once, torchrun=restarts))
    assert code == 0, err
    assert err.count("from step 1, by 2 processes") == 1
    same_experiment(alone, tmp_path / "runs" / "two")


@pytest.mark.slow
def test_two_processes_go_on_from_one(tiny_folder: Path, tmp_path: Path, alone: Path) -> None:
    by_one(tmp_path, "train", "--model", tiny_folder, "--run", "two", *TRAIN, "--num-iterations", "2")
    arguments = ["train", "--run", "two", "--resume", "--num-iterations", "3"]
    code, _, err = ended(launched(tmp_path, 2, *arguments))
    assert code == 0, err
    assert rows(alone / "samples.jsonl") == rows(tmp_path / "runs" / "two" / "samples.jsonl")


@pytest.mark.slow
def test_sharded_weights_learn_the_same_and_go_on_in_any_number(tiny_folder: Path, tmp_path: Path, alone: Path) -> None:
    """Three steps: sharded over two throughout; then one step sharded, one whole, one sharded again."""
    code, _, err = ended(launched(tmp_path, 2, "train", "--model", tiny_folder, "--run", "two", *TRAIN, "--shard"))
    assert code == 0, err
    same_experiment(alone, tmp_path / "runs" / "two")
    saved = tmp_path / "runs" / "two" / "checkpoints" / "step-3"
    whole = AutoModelForCausalLM.from_pretrained(saved / "model").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(alone / "checkpoints" / "step-3" / "model").state_dict()
    assert all(torch.allclose(whole[name], expected[name], atol=1e-5) for name in expected)

    goes_on = ["train", "--run", "mixed", "--resume", "--num-iterations"]
    first = ["train", "--model", tiny_folder, "--run", "mixed", *TRAIN, "--optimizer", "adamw", "--num-iterations", "1"]
    assert ended(launched(tmp_path, 2, *first, "--shard"))[0] == 0
    by_one(tmp_path, *goes_on, "2", "--no-shard")
    code, _, err = ended(launched(tmp_path, 2, *goes_on, "3", "--shard"))
    assert code == 0, err
    assert rows(alone / "samples.jsonl") == rows(tmp_path / "runs" / "mixed" / "samples.jsonl")
    curves = [rows(run / "metrics.jsonl")[1:] for run in (alone, tmp_path / "runs" / "mixed")]
    for line, same in zip(*curves, strict=True):
        assert same["loss"] == pytest.approx(line["loss"], abs=1e-5)


def wait_for(found: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until
        time.sleep(0.05)
