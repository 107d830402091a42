"""vLLM as a server: token ids go there and come back with log-probabilities, weights go through a folder that both see.

A hand-over zeroes the server's weights before it loads the new ones, compares log-probabilities of a probe with the
policy's, and sets a version, which every completion must bear: a rollout of old weights is an error, not noise.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.fsdp import full
from grpo_cli.core.model.attention import sum_dtype
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.templates import PROBE
from grpo_cli.core.rollout.engine import EngineLost
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.vllm import (
    PROBED,
    RESUME,
    Completion,
    Vllm,
    require_same_weights,
    sampling,
    vllm_weights,
)
from grpo_cli.core.world import World

AT_ONCE = 128  # prompts sent at the same time
POLL = 0.2  # seconds between polls for a signal
ANSWER = 60.0  # seconds in which a server says how it is set up; its first completion compiles kernels
RESTART = f"start it again; {RESUME}"


@dataclass(frozen=True)
class Server:
    """A vLLM server at `url`; it is lost after `timeout` seconds of silence."""

    url: str
    timeout: float
    _open: set[HTTPConnection] = field(default_factory=set, repr=False)

    def ask(self, path: str, body: object = None, hint: str = RESTART) -> dict[str, Any]:
        """The reply to a POST of `body`, or to a GET without; raises EngineLost."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        self._open.add(connection)
        try:
            sent = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if sent is None else "POST", f"{parts.path}/{path}", sent, headers)
            with connection.getresponse() as response:
                text = response.read()
        except (OSError, HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self.lost(f"does not answer: {reason}", hint) from error
        finally:
            self._open.discard(connection)
            connection.close()
        try:
            reply = json.loads(text)
        except ValueError:
            reply = text[:100].decode(errors="replace")
        if response.status != 200 or not isinstance(reply, dict):
            raise self.lost(f"refuses `{path}`: {_reason(reply)}", hint)
        return reply

    def lost(self, problem: str, hint: str = RESTART) -> EngineLost:
        """The error that the server has this problem."""
        return EngineLost(f"vLLM at `{self.url}` {problem}", hint)

    def hang_up(self) -> None:
        """Close all connections; the server then aborts their requests."""
        for connection in [*self._open]:
            with suppress(OSError, AttributeError):  # not connected yet, or no longer
                connection.sock.shutdown(socket.SHUT_RDWR)


def require_server(url: str, model: str, *, dtype: str) -> None:
    """Raise CountdownError, with the command that starts one, unless a vLLM server is there and set up right."""
    port = urlsplit(url).port or 80
    hint = (
        f"start it: VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model {model} --port {port} "
        f"--dtype {dtype} --logprobs-mode processed_logprobs --generation-config vllm --enable-scale-out"
    )
    server = Server(url, ANSWER)
    try:
        info = server.ask("server_info?config_format=json")
        server.ask("inference/v1/generate", {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
        mode = info["vllm_config"]["model_config"]["logprobs_mode"]
    except EngineLost as error:
        raise CountdownError(error.message, hint) from error
    except (KeyError, TypeError) as error:
        raise CountdownError(f"`{url}` is no vLLM server with VLLM_SERVER_DEV_MODE=1", hint) from error
    if mode != "processed_logprobs":
        raise CountdownError(f"vLLM at `{url}` returns `{mode}`, not `processed_logprobs`", hint)


@dataclass
class ServerEngine(Vllm):
    """Samples with a vLLM server. `learner` has the weights, `policy` the tokenizer; each rank sends its prompts."""

    learner: Policy
    server: Server
    folder: str | None  # parent of the folders with weights
    world: World
    _loaded: list[float] = field(default_factory=list, repr=False)  # sums of the weights that the server has
    _version: str = ""

    @torch.no_grad()
    def update_weights(self) -> None:
        """Hand over the weights if they have changed, and compare a probe; all ranks gather sharded weights."""
        kind, weights = sum_dtype(self.learner.device), self.learner.model.parameters()
        sums = [float(full(weight.detach().sum(dtype=kind))) for weight in weights]
        if sums == self._loaded:
            return
        self._version = self.world.first(lambda: uuid4().hex)
        prompt = self.policy.encode(PROBE)
        with ExitStack() as stack:
            folder = self.world.agree(partial(self._write, stack))
            probe = self.world.gather(self.world.agree(partial(self._load, folder, prompt)))[0]
        assert probe is not None
        require_same_weights(self.learner, prompt, probe, f"vLLM at `{self.server.url}`")
        self._loaded = sums

    def _write(self, stack: ExitStack) -> Path | None:
        """The folder with one file per weight, on the first rank; no rank ever has them all."""
        folder, problem = None, None
        for number, (name, tensor) in enumerate(vllm_weights(self.learner)):
            whole = full(tensor)  # by all ranks, whether or not the first can write
            if self.world.is_first and problem is None:
                try:
                    folder = folder or Path(stack.enter_context(TemporaryDirectory("", "countdown-", self.folder)))
                    save_file({name: whole.cpu().contiguous()}, folder / f"{number}.safetensors")
                except (OSError, SafetensorError) as error:
                    problem = " ".join(str(error).split())
        if problem:
            raise EngineLost(f"cannot write weights for vLLM: {problem}", f"free some space; {RESUME}")
        return folder

    def _load(self, folder: Path | None, prompt: list[int]) -> Completion | None:
        """Let the server load the weights in `folder`; returns a completion of the probe. Other ranks do nothing."""
        if folder is None:
            return None
        ask, path = self.server.ask, str(folder.resolve())
        hint = f"give a `--vllm-folder` that the server sees too; {RESUME}"
        ask("weight_checker", {"action": "reset"})
        ask("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}, hint)
        if not ask("reset_prefix_cache?reset_running_requests=true", {}).get("success"):
            raise self.server.lost("keeps a cache of old weights")
        ask("update_weight_version", {"new_version": self._version})
        return self._complete(prompt, PROBED, torch.zeros(1))[0]

    def _generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        uniform: Tensor | None,
        on_token: Callable[[int], None] | None,
    ) -> list[list[Completion]]:
        groups = list[list[Completion]]()
        with ThreadPoolExecutor(min(len(prompts), AT_ONCE) or 1) as pool:
            seeds = [None] * len(prompts) if uniform is None else [*uniform]
            futures = [
                pool.submit(self._complete, prompt, params, seed) for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            try:
                for number, future in enumerate(futures):
                    while not wait([future], POLL).done:
                        if on_token is not None:  # the server counts no tokens: by the share of prompts
                            on_token(1 + (params.max_new_tokens - 1) * number // len(futures))
                    groups.append(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.server.hang_up()
                raise
        return groups

    def _complete(self, prompt: list[int], params: SamplingParams, uniform: Tensor | None) -> list[Completion]:
        """The completions of one prompt, checked: of this version of the weights, as many and as long as asked for."""
        asked = {"token_ids": prompt, "sampling_params": sampling(self.policy, params, uniform)}
        reply = self.server.ask("inference/v1/generate", asked)
        try:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            rows = [self._read(choice, params.max_new_tokens) for choice in choices]
            versions = {span["version"] for choice in choices for span in choice["weight_versions"]}
        except (KeyError, TypeError, ValueError, AttributeError):
            rows, versions = [], set()
        if len(rows) != params.num_generations:
            raise self.server.lost(f"sent other completions than asked for: {str(reply)[:100]}")
        if versions != {self._version}:
            hint = f"give each training a server of its own; {RESUME}"
            raise self.server.lost("sampled with other weights than the policy's", hint)
        return rows

    def _read(self, choice: dict[str, Any], limit: int) -> Completion:
        """A completion in the server's form; raises ValueError or KeyError if it is none."""
        tokens, content = choice["token_ids"], choice["logprobs"]["content"]
        logprobs, truncated = [float(entry["logprob"]) for entry in content], choice["finish_reason"] == "length"
        if (
            [entry["token_id"] for entry in content] != tokens
            or not all(map(math.isfinite, logprobs))
            or not (len(tokens) == limit if truncated else tokens and tokens[-1] in self.policy.end_ids)
        ):
            raise ValueError
        return tokens, logprobs, truncated


def _reason(reply: object) -> str:
    """The message of an error that the server replied, in one line."""
    if isinstance(reply, dict):
        error = reply.get("error", reply)
        reply = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(reply).split())[:200]
