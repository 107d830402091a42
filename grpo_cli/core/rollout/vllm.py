"""vLLM as the engine: completions are sampled by another program, in this process, from copies of the weights.

Before each rollout vLLM gets the policy's weights if they have changed. Its own are set to zero first, and then the
log-probabilities of a probe are compared: a rollout of old weights is an error, not noise. They are those of the
sampling distribution, like ours, but not bit for bit: `sampler_gap` measures the difference, and `sampler_correction`
corrects for it. On a CPU vLLM draws without a seed for each completion, so that a run cannot be repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model import lora
from grpo_cli.core.model.load import require_context
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.templates import PROBE
from grpo_cli.core.rollout.engine import EngineLost, Rollout
from grpo_cli.core.rollout.params import SamplingParams

PROBED = SamplingParams(16, temperature=0.7)  # a temperature, so that raw log-probabilities are noticed
GAP = {"float32": 1e-3}  # largest mean distance of the probe's log-probabilities, by precision; others: 0.1
RESUME = "a training then continues with `--resume`"

Completion = tuple[list[int], list[float], bool]  # token ids, log-probabilities, whether truncated


@dataclass
class Vllm:
    """What the engine in this process and the server share."""

    policy: Policy

    def sample(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        uniform: Tensor | None,
        micro_batch: MicroBatch | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Rollout:
        """As `Engine.sample`. Batches are vLLM's own, whatever `micro_batch`; `uniform` only seeds the draws."""
        for prompt in prompts:
            require_context(self.policy.name, self.policy.model.config, len(prompt) + params.max_new_tokens)
        start = perf_counter()
        rows = [row for group in self._generate(prompts, params, uniform, on_token) for row in group]
        return Rollout(
            [tokens for tokens, _, _ in rows],
            [logprobs for _, logprobs, _ in rows],
            [truncated for _, _, truncated in rows],
            {"decode": perf_counter() - start},
            sum(map(len, prompts)) + sum(len(tokens) for tokens, _, _ in rows),
        )

    def stream(self, prompt: list[int], params: SamplingParams, *, uniform: Tensor | None) -> Iterator[str]:
        """Yield the text of one completion, all at once."""
        yield self.policy.decode(self.sample([prompt], params, uniform=uniform).completions[0])

    def _generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        uniform: Tensor | None,
        on_token: Callable[[int], None] | None,
    ) -> list[list[Completion]]:
        """The completions of each prompt."""
        raise NotImplementedError


@dataclass
class VllmEngine(Vllm):
    """Samples with vLLM. `context`: tokens of the longest prompt and completion; `memory`: its share of a GPU.

    VLLM_ENABLE_V1_MULTIPROCESSING must be 0: weights are handed over within the process. The command line sets it.
    """

    context: int
    memory: float
    _llm: Any = field(default=None, repr=False)
    _loaded: list[float] = field(default_factory=list, repr=False)  # sums of the weights that vLLM has

    def _generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        uniform: Tensor | None,
        on_token: Callable[[int], None] | None,
    ) -> list[list[Completion]]:
        engine, vllm, count = self._llm.llm_engine, import_module("vllm"), 0
        finished: dict[int, list[Any]] = {}
        try:
            for number, prompt in enumerate(prompts):
                asked = vllm.SamplingParams(
                    **sampling(self.policy, params, None if uniform is None else uniform[number]),
                    output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(str(number), {"prompt_token_ids": prompt}, asked)
            while engine.has_unfinished_requests():
                finished |= {int(output.request_id): output.outputs for output in engine.step()}
                count += 1
                if on_token is not None:
                    on_token(min(count, params.max_new_tokens))
        except BaseException:
            engine.abort_request([str(number) for number in range(len(prompts))])
            raise
        return [
            [_completion(output) for output in sorted(finished[number], key=attrgetter("index"))]
            for number in range(len(prompts))
        ]

    @torch.no_grad()
    def update_weights(self) -> None:
        """Start vLLM if it does not run; hand over the policy's weights if they have changed, and compare a probe."""
        if self._llm is None:
            self._llm = self._start()
        sums = self.policy.sums()
        if sums != self._loaded:
            self._llm.collective_rpc("reset_weights")
            self._load_weights()
            prompt = self.policy.encode(PROBE)
            ((probe,),) = self._generate([prompt], PROBED, torch.zeros(1, 1, 1), None)
            require_same_weights(self.policy, prompt, probe, "vLLM")
            self._loaded = sums

    def _start(self) -> Any:
        """Start vLLM on a saved copy of the model."""
        with tempfile.TemporaryDirectory(prefix="countdown-vllm-") as folder:
            self.policy.save(Path(folder))
            try:
                return import_module("vllm").LLM(
                    folder,
                    dtype=str(vllm_dtype(self.policy)).removeprefix("torch."),
                    max_model_len=self.context,
                    gpu_memory_utilization=self.memory,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",  # not the folder's
                    disable_log_stats=True,
                    enforce_eager=self.policy.device.type == "cpu",  # compiling takes minutes there
                )
            except Exception as error:  # vLLM's errors have no common base
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise CountdownError(
                    f"vLLM does not run `{self.policy.name}`: {reason}", "use `--rollout local`"
                ) from error

    def _load_weights(self) -> None:
        """Hand the policy's weights to vLLM."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(vllm_weights(self.policy))})
        self._llm.reset_prefix_cache()


def require_same_weights(policy: Policy, prompt: list[int], probe: Completion, server: str) -> None:
    """Raise EngineLost if the log-probabilities of a completion by `server` are not the policy's."""
    tokens, theirs, _ = probe
    with policy.autocast():
        ours, _ = policy.logprobs(Sequences([prompt], [tokens], [0]), temperature=PROBED.temperature)
    gap = float((ours[0].cpu() - torch.tensor(theirs)).abs().mean())
    if not gap <= GAP.get(policy.precision, 0.1):
        raise EngineLost(
            f"{server} has other weights than the policy: log-probabilities differ by {gap:.3g}",
            f"let it serve the model `{policy.name}`, or use `--rollout local`; {RESUME}",
        )


def vllm_dtype(policy: Policy) -> torch.dtype:
    return torch.float32 if policy.precision == "float32" else torch.bfloat16


def vllm_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The names and weights that vLLM loads, with an adapter merged in."""
    state = lora.merged_state(policy.model) if policy.adapter else policy.model.state_dict()
    return ((name, tensor.to(vllm_dtype(policy))) for name, tensor in state.items())


def sampling(policy: Policy, params: SamplingParams, uniform: Tensor | None) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams: no top-k, top-p or penalties. `uniform` (G, T) gives the seed."""
    seeded = uniform is not None and policy.device.type == "cuda"  # vLLM's CPU backend fails on seeds
    return {
        "n": params.num_generations,
        "temperature": 0.0 if uniform is None else params.temperature,
        "max_tokens": params.max_new_tokens,
        "logprobs": 0,
        "stop_token_ids": list(policy.end_ids),
        "ignore_eos": True,  # the list has it
        "detokenize": False,
        "seed": int(uniform.sum() * 2**40) % 2**31 if seeded and uniform is not None else None,
    }


def _completion(output: Any) -> Completion:
    """A completion in vLLM's form."""
    tokens = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True)]
    return tokens, logprobs, output.finish_reason == "length"
