"""Operators of a decode step and of an update's micro-batch: transformers, plain, and with fused kernels.

    python benchmarks/operators.py --out operators.json

Counts the operators that torch dispatches on a CPU for Qwen2 models of one and two layers, and extrapolates to 28. On a
GPU, each operator except views and allocations is about one kernel. A Triton kernel counts as one and is not run.
`gpu.py` measures real kernels and their times.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu import model_folder
from measured import table, write
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from grpo_cli.core.model import kernels, llama
from grpo_cli.core.model.load import load
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import Policy, Sequences, set_attention
from grpo_cli.core.rollout.decode import Form, StaticSampler
from grpo_cli.core.rollout.params import SamplingParams

LAYERS, VOCABULARY = 28, 9000  # large enough for sampling by sums of blocks
LAUNCHED = ("_decode_attention", "_logprobs", "_logprobs_backward", "_swiglu", "_swiglu_backward")
PROMPTS, NEW_TOKENS, GENERATIONS, TEMPERATURE = [[5, 9, 200, 31], [7, 8]], 4, 2, 1.2


class Operators(TorchDispatchMode):
    """Counts dispatched operators, except views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or "empty" in name or name in ("detach", "alias", "_unsafe_view"))
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(operators: Operators) -> Iterator[None]:
    """Count Triton's kernels instead of running them."""

    def launch(*_: object) -> None:
        operators.count += 1

    with mock.patch.multiple(
        kernels, **{name: mock.MagicMock(**{"__getitem__.return_value": launch}) for name in LAUNCHED}
    ):
        yield


def counted(work: Callable[[], object]) -> int:
    """Operators of `work`, after a warm-up."""
    with launches(Operators()):
        work()
    operators = Operators()
    with launches(operators), operators:
        work()
    return operators.count


def decode(policy: Policy) -> Callable[[], object]:
    """One decode step of all rows, from the last tokens to the sampled ones, as in a CUDA graph."""
    form = Form(len(PROMPTS), 32, SamplingParams(NEW_TOKENS, TEMPERATURE, GENERATIONS))
    sampler = StaticSampler(policy, form)
    sampler.start(PROMPTS, torch.rand(len(PROMPTS) * GENERATIONS, NEW_TOKENS, dtype=torch.float64))
    sampler.time.fill_(1)
    return torch.inference_mode()(sampler._turn)


def decode_of_transformers(policy: Policy) -> Callable[[], object]:
    """The same with the model's own forward, its cache and a plain draw."""
    cache, token = DynamicCache(config=policy.model.config), torch.tensor([[5]] * 4)

    def step() -> None:
        logits = policy.model(input_ids=token, cache=cache, use_cache=True).logits[:, -1]
        torch.multinomial((logits.float() / TEMPERATURE).softmax(dim=-1), 1)

    return torch.no_grad()(step)


def update(policy: Policy) -> Callable[[], object]:
    """Log-probabilities with entropy, and their gradient."""
    completions = [[11, 12, 13, 14]] * len(PROMPTS) * GENERATIONS
    sequences = Sequences(PROMPTS, completions, [row // GENERATIONS for row in range(len(completions))])

    def step() -> None:
        policy.logprobs(sequences, temperature=TEMPERATURE)[0].sum().backward()
        policy.model.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    given = parser.parse_args()
    counts: dict[str, list[int]] = {}
    for layers in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            folder = model_folder(Path(scratch), "tiny", num_hidden_layers=layers, vocab_size=VOCABULARY)
            policy, theirs = (load(folder, device="cpu", precision="bf16") for _ in range(2))
        set_attention(theirs.model, plain=True)
        fused, theirs = replace(policy, path=PackedPath(fused=True)), replace(theirs, path=PlainPath())
        # Without kernels, a GPU updates through the model's own forward.
        with mock.patch.object(llama, "fits", return_value=False):
            found = {"update, packed": counted(update(policy))}
        found |= {
            "decode, transformers": counted(decode_of_transformers(theirs)),
            "decode, static cache": counted(decode(policy)),
            "decode, fused": counted(decode(fused)),
            "update, transformers": counted(update(theirs)),
            "update, fused": counted(update(fused)),
        }
        for name, count in found.items():
            counts.setdefault(name, []).append(count)
    results = {
        name: {"layer": two - one, "step": one + (LAYERS - 1) * (two - one)} for name, (one, two) in counts.items()
    }
    rows = [[name, str(found["layer"]), f"{found['step']:,}"] for name, found in sorted(results.items())]
    print(table(["operators", "a layer", f"{LAYERS} layers"], rows))
    write(given.out, results)


if __name__ == "__main__":
    main()
