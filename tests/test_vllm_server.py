"""A vLLM server as the engine, against a small fake of it; `pytest -m vllm` has the real one."""

import copy
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command
from forked import Forked
from safetensors.torch import load_file
from test_rollout import encoded
from test_vllm import assert_follows, gap

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.load import BUILTIN, load
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.engine import EngineLost, uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.make import make_engine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.vllm_server import Server, require_server
from grpo_cli.core.run.folder import Run
from grpo_cli.core.world import World

Reply = dict[str, Any]
GENERATE, RELOAD, RESET = "inference/v1/generate", "collective_rpc", "weight_checker"


class FakeServer(ThreadingHTTPServer):
    """Answers as `vllm serve` does, with a policy of its own. `faults` replace the answer to a path."""

    daemon_threads = True

    def __init__(self, policy: Policy) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy, self.version, self.calls, self.one = policy, "default", list[str](), threading.Lock()
        self.faults: dict[str, Callable[[Reply], object]] = {}
        self.mode = "processed_logprobs"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: Reply) -> object:
        self.calls.append(path)
        return (self.faults.get(path) or self.right(path))(body)

    def right(self, path: str) -> Callable[[Reply], object]:
        return {
            "server_info": lambda _: {"vllm_config": {"model_config": {"logprobs_mode": self.mode}}},
            RESET: lambda _: self.load(dict.fromkeys(self.policy.model.state_dict())),
            RELOAD: lambda body: self.load(self.read(Path(body["kwargs"]["weights_path"]))),
            "reset_prefix_cache": lambda _: {"success": True},
            "update_weight_version": lambda body: vars(self).update(version=body["new_version"]) or {"success": True},
            GENERATE: self.generate,
        }[path]

    @staticmethod
    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    def load(self, state: dict[str, Any]) -> Reply:
        with torch.no_grad():
            for name, tensor in self.policy.model.state_dict().items():
                tensor.copy_(torch.zeros(()) if state[name] is None else state[name])
        return {"results": [None]}

    def generate(self, body: Reply) -> Reply:
        asked = body["sampling_params"]
        size, limit = asked.get("n", 1), asked["max_tokens"]
        params = SamplingParams(limit, asked.get("temperature", 1.0), size)
        uniform = None if params.greedy else uniforms(asked.get("seed", 0), 0, [0], size, limit)
        with self.one:
            rollout = LocalEngine(self.policy).sample([body["token_ids"]], params, uniform=uniform)
        rows = zip(rollout.completions, rollout.logprobs, rollout.truncated, strict=True)
        choices = [
            {
                "index": index,
                "finish_reason": "length" if cut else "stop",
                "token_ids": tokens,
                "logprobs": {"content": [{"token_id": t, "logprob": p} for t, p in zip(tokens, values, strict=True)]},
                "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
            }
            for index, (tokens, values, cut) in enumerate(rows)
        ]
        return {"choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        path = self.path.partition("?")[0][1:]
        try:
            reply = self.server.answer(path, body)
        except KeyError:
            reply = None
        text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(404 if reply is None else 200)
        self.end_headers()
        with suppress(BrokenPipeError):  # the client has given up
            self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(tiny_policy: Policy) -> Iterator[FakeServer]:
    with FakeServer(copy.deepcopy(tiny_policy)) as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


def slow(_: Reply) -> Reply:
    time.sleep(2)
    return {}


def engine_of(policy: Policy, url: str) -> Any:
    flags = {"model.rollout": "vllm", "model.vllm_url": url}
    return make_engine(policy, resolve(flags=flags).settings, max_new_tokens=60)


def changed(policy: Policy) -> None:
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))


def test_completions_have_the_log_probs_of_the_policy_after_every_change(
    tiny_policy: Policy, server: FakeServer
) -> None:
    engine, prompts = engine_of(tiny_policy, server.url), encoded(tiny_policy)
    for _ in range(2):
        assert gap(engine) < 1e-4
        changed(tiny_policy)
    greedy = (one.sample(prompts, SamplingParams(8, 0.0), uniform=None) for one in (engine, LocalEngine(server.policy)))
    assert next(greedy).completions == next(greedy).completions


def test_equal_weights_are_handed_over_once(tiny_policy: Policy, server: FakeServer) -> None:
    engine = engine_of(tiny_policy, server.url)
    for _ in range(3):
        engine.update_weights()
    assert server.calls.count(RELOAD) == 1
    changed(tiny_policy)
    engine.update_weights()
    assert server.calls.count(RELOAD) == 2


@pytest.mark.parametrize("ignored", [(RELOAD,), (RESET, RELOAD)])
def test_a_server_that_keeps_its_old_weights_is_noticed(
    tiny_policy: Policy, server: FakeServer, ignored: tuple[str, ...]
) -> None:
    engine = engine_of(tiny_policy, server.url)
    engine.update_weights()
    changed(tiny_policy)
    server.faults = dict.fromkeys(ignored, lambda _: {"results": [None]})
    with pytest.raises(EngineLost, match="has other weights than the policy") as raised:
        engine.update_weights()
    assert raised.value.exit_code == 1


def test_a_server_that_restarts_or_gets_the_weights_of_another_training_is_noticed(
    tiny_policy: Policy, server: FakeServer
) -> None:
    engine = engine_of(tiny_policy, server.url)
    engine.update_weights()
    engine_of(tiny_policy, server.url).update_weights()
    with pytest.raises(EngineLost, match="sampled with other weights"):
        engine.sample(encoded(tiny_policy), SamplingParams(4, 0.0), uniform=None)


def spoiled(change: Callable[[Reply], object]) -> Callable[[Reply], Reply]:
    """Changes the first choice of a reply."""

    def spoil(reply: Reply) -> Reply:
        change(reply["choices"][0])
        return reply

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"<html>",
        lambda _: [1],
        lambda _: {"choices": []},
        lambda _: {"choices": ["text"]},
        spoiled(lambda choice: choice.pop("logprobs")),
        spoiled(lambda choice: choice.update(finish_reason="abort", token_ids=choice["token_ids"][:1])),
        spoiled(lambda choice: choice["token_ids"].append(5)),
        spoiled(lambda choice: choice["logprobs"]["content"][0].update(logprob=float("nan"))),
    ],
)
def test_a_malformed_reply_is_one_sentence(
    tiny_policy: Policy, server: FakeServer, spoil: Callable[[Reply], object]
) -> None:
    engine = engine_of(tiny_policy, server.url)
    engine.update_weights()
    server.faults = {GENERATE: lambda body: spoil(server.generate(body))}
    with pytest.raises(EngineLost, match=r"sent other completions than|refuses `inference/v1/generate`"):
        engine.sample(encoded(tiny_policy), SamplingParams(4, 0.0), uniform=None)


def test_a_hanging_server_is_lost_after_the_timeout(tiny_policy: Policy, server: FakeServer) -> None:
    engine = engine_of(tiny_policy, server.url)
    engine.update_weights()
    server.faults, engine.server, start = {GENERATE: slow}, Server(server.url, 0.2), time.perf_counter()
    with pytest.raises(EngineLost, match="does not answer: timed out"):
        engine.sample(encoded(tiny_policy), SamplingParams(4, 0.0), uniform=None)
    assert time.perf_counter() - start < 1.5


def test_a_reply_that_stops_halfway_is_one_sentence_and_leaves_no_socket_open() -> None:
    def ask(listener: socket.socket) -> None:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(Server(url, 0.5).ask, "server_info")
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{")
                with pytest.raises(EngineLost, match="does not answer: timed out") as caught:
                    asked.result()
        assert caught.tb  # it refers to this frame and the frame to it: only the collector frees what they hold

    with socket.create_server(("127.0.0.1", 0)) as listener:
        ask(listener)
    gc.collect()  # a socket that is still open warns here


def test_a_cache_of_old_weights_is_noticed(tiny_policy: Policy, server: FakeServer) -> None:
    server.faults = {"reset_prefix_cache": lambda _: {"success": False}}
    with pytest.raises(EngineLost, match="keeps a cache of old weights"):
        engine_of(tiny_policy, server.url).update_weights()


def test_a_full_disk_is_one_sentence_and_no_weights_are_left(
    tiny_policy: Policy, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_policy, server.url)
    engine.folder = str(tmp_path)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("grpo_cli.core.rollout.vllm_server.save_file", full)
    with pytest.raises(EngineLost, match="cannot write weights for vLLM: No space left on device"):
        engine.update_weights()
    monkeypatch.undo()
    engine.update_weights()
    assert not [*tmp_path.iterdir()]


def test_an_interruption_does_not_wait_for_the_server(tiny_policy: Policy, server: FakeServer) -> None:
    engine, start = engine_of(tiny_policy, server.url), time.perf_counter()
    engine.update_weights()
    server.faults = {GENERATE: slow}

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.sample(encoded(tiny_policy), SamplingParams(4, 0.0), uniform=None, on_token=stop)
    assert time.perf_counter() - start < 2


def test_a_missing_or_wrong_server_is_named_before_a_model_loads(
    countdown: Command, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_cli.core.rollout.selfcheck.load_checked", lambda *_, **__: pytest.fail("loaded"))
    nobody = "http://127.0.0.1:9"
    for given in (["eval", "builtin", "--limit", 1], ["train", "--num-iterations", 1], ["solve", "3 5 2 = 13"]):
        found = countdown(*given, "--rollout", "vllm", "--vllm-url", nobody, "--precision", "float32")
        assert found.code == 2 and f"vLLM at `{nobody}` does not answer: " in found.err
        assert "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model " in found.err
        assert "--port 9 --dtype float32 --logprobs-mode processed_logprobs" in " ".join(found.err.split())

    def refused(*more: str) -> str:
        found = countdown("eval", "builtin", "--limit", 1, "--rollout", "vllm", "--vllm-url", server.url, *more)
        assert found.code == 2
        return " ".join(found.err.split())

    server.mode = "raw_logprobs"
    assert "returns `raw_logprobs`, not `processed_logprobs`" in refused()
    server.faults = {"server_info": lambda _: None}
    assert "refuses `server_info" in refused()
    server.faults = {"server_info": lambda _: {"hello": 1}}
    assert "is no vLLM server with VLLM_SERVER_DEV_MODE=1" in refused()
    assert "there is no folder `gone`" in refused("--vllm-folder", "gone")
    for url in ("localhost:8000", "ftp://x", "http://", "http://x:port", "http://x:99999"):
        found = countdown("eval", "builtin", "--rollout", "vllm", "--vllm-url", url)
        assert found.code == 2 and "must be an address like http://localhost:8000" in " ".join(found.err.split()), url


def test_a_server_that_dies_ends_the_training_with_the_last_step_saved(
    countdown: Command, server: FakeServer, tiny_folder: Path, tmp_path: Path
) -> None:
    given = [*SMALL, "--model", tiny_folder, "--rollout", "vllm", "--vllm-url", server.url, "--num-iterations", 3]
    given += ["--save-every", 10, "--eval-every", 3, "--learning-rate", 1e-2]

    def dies_in_step_two(body: Reply) -> object:  # asked once at the start, by the probe, for val, dev and step 1
        return b"dead" if server.calls.count(GENERATE) > 1 + 1 + 2 + 2 + 2 else server.generate(body)

    server.faults = {GENERATE: dies_in_step_two}
    found = countdown("train", "--run", "one", *given)
    assert found.code == 1, found.err
    assert "Traceback" not in found.err and "vLLM at `" in found.err and "--resume" in found.err
    run = tmp_path / "runs" / "one"
    assert Run.open(run.parent, "one").saved_steps == "1"
    server.faults = {}
    resumed = countdown("train", "--run", "one", "--resume")
    assert resumed.code == 0, resumed.err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("other", [None, EngineLost("gone")])
def test_all_ranks_raise_the_error_of_any(other: EngineLost | None) -> None:
    class Rank(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, other]

    with pytest.raises(EngineLost, match="gone") if other else nullcontext():
        assert Rank(0, 2).agree(lambda: 5) == 5


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command that the hint of a missing server gives."""
    pytest.importorskip("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CountdownError) as raised:
        require_server(url, str(BUILTIN), dtype="float32")
    assert raised.value.hint is not None
    command = raised.value.hint.partition(" python ")[2].split()
    environ = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    given = [sys.executable, *command, "--enforce-eager", "--max-model-len", "1024"]  # compiling takes minutes
    with (tmp_path_factory.mktemp("server") / "log").open("wb") as log:
        process = subprocess.Popen(given, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            with suppress(CountdownError):
                require_server(url, str(BUILTIN), dtype="float32")
                break
            assert process.poll() is None, Path(log.name).read_text()[-2000:]
            time.sleep(1)
        yield process, url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.vllm
def test_log_probs_of_a_real_server_are_those_of_the_policy_whatever_weight_changes(
    real: tuple[subprocess.Popen[bytes], str],
) -> None:
    assert_follows(engine_of(load("builtin", device="cpu", precision="float32"), real[1]))


@pytest.mark.vllm
def test_a_training_goes_on_until_its_real_server_is_killed(
    real: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, url = real
    given = ["--rollout", "vllm", "--vllm-url", url, "--batch-size", 2, "--num-generations", 4]
    given += ["--max-new-tokens", 60, "--eval-puzzles", 4, "--precision", "float32", "--num-iterations", 500]
    training = Forked(tmp_path, "train", "--run", "one", *given, "--learning-rate", 1e-3)
    training.read_until("step 2 of 500")
    os.killpg(process.pid, signal.SIGKILL)
    code, rest = training.ended()
    assert code == 1 and f"error: vLLM at `{url}` does not answer" in rest and "Traceback" not in rest
    run = Run.open(tmp_path / "runs", "one")
    lines = run.metrics()
    assert run.saved_steps == str(lines[-1]["step"])
    assert max(line.get("sampler_gap", 0.0) for line in lines) < 1e-4
