"""Model FLOP utilization of a training step, padding and peak memory.

MFU (PaLM, arXiv 2204.02311) is the operations that a step needs over those that the hardware could do in its time: for
each token, two for every weight that it is multiplied with. Each prompt counts once for its group, the first tokens
that all prompts share once for the step, attention and recomputation not at all. It is left out where a token does not
meet all weights or they do not all learn: LoRA, 4-bit weights, mixtures of experts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from grpo_cli.core.microbatch import process_peak
from grpo_cli.core.model.attention import num_shared
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.engine import Rollout

Groups = Sequence[tuple[int, Sequence[int]]]  # tokens of each prompt, and of each of its completions


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a forward pass."""

    token: int  # for each token, without its logits
    logits: int  # for the logits of a token

    def forward(self, groups: Groups, shared: int = 0) -> int:
        """Of one pass over [prompt | completions] of each group, with the logits of its completions.

        The first `shared` tokens of all prompts are computed once.
        """
        prompts = sum(prompt for prompt, _ in groups) - shared * max(len(groups) - 1, 0)
        completions = sum(sum(lengths) for _, lengths in groups)
        return self.token * (prompts + completions) + self.logits * completions


def operations(policy: Policy) -> Operations | None:
    """The operations of a policy's model, or None where the rules of this module are not right."""
    output, weights = policy.model.get_output_embeddings(), list(policy.model.parameters())
    if isinstance(policy.path, PlainPath) or policy.is_sharded or output is None:
        return None
    if any(not weight.requires_grad or weight.dim() > 2 for weight in weights):  # experts are stacked in one weight
        return None
    looked_up = {module.weight for module in policy.model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [weight for weight in weights if weight.dim() == 2 and weight not in looked_up | {output.weight}]
    return Operations(2 * sum(weight.numel() for weight in matrices), 2 * output.weight.numel())


# Data sheets of NVIDIA and AMD: (pattern of the device's name, dense bfloat16 TFLOP/s), the first match. Other devices,
# and float32, are measured.
KNOWN: tuple[tuple[str, float], ...] = (
    (r"B200", 2250),
    (r"H200 NVL", 836),
    (r"H200", 989),
    (r"H100 NVL", 836),
    (r"H100 PCIe", 756),
    (r"H100", 989),
    (r"A100", 312),
    (r"L40S", 362),
    (r"L4$", 121),
    (r"A10G", 70),
    (r"A10$", 125),
    (r"RTX 6000 Ada", 364),
    (r"RTX 5090$", 209.5),
    (r"RTX 4090$", 165.2),
    (r"RTX 3090 Ti", 80),
    (r"RTX 3090$", 71),
    (r"MI300X", 1307),
)
MATRIX, REPEATS = 1024, 8  # rows and columns, products
SECONDS = 1.0  # after which no further product is timed: a CPU that emulates bfloat16 takes seconds for one


def known(name: str) -> float | None:
    """The bfloat16 TFLOP/s of a GPU by its device name, or None."""
    return next((rate for pattern, rate in KNOWN if re.search(rf"\b{pattern}", name)), None)


@cache
def peak_tflops(device: torch.device, precision: str) -> float:
    """The peak rate of matrix products on a device in a training's precision."""
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    listed = device.type == "cuda" and dtype == torch.bfloat16
    return (known(torch.cuda.get_device_name(device)) if listed else None) or measure(device, dtype)


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the best of a few matrix products, with torch's current number of threads."""
    left, right = (torch.ones(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > SECONDS:
            break
    return 2 * MATRIX**3 / min(seconds) / 1e12


@dataclass
class Meter:
    """Measures a step, from `reset` on; `operations` of the policy, if known."""

    policy: Policy
    operations: Operations | None
    prompts: list[Sequence[int]] = field(default_factory=list)  # token ids
    sampled_groups: list[tuple[int, list[int]]] = field(default_factory=list)
    computed: int = 0  # token positions of all rollouts

    def reset(self) -> None:
        """Start to measure a step."""
        self.prompts, self.sampled_groups, self.computed = [], [], 0
        if self.policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.policy.device)

    def sampled(self, prompts: Sequence[Sequence[int]], rollout: Rollout) -> None:
        """Count a rollout of these prompts (token ids)."""
        lengths = list(map(len, rollout.completions))
        size = len(lengths) // max(len(prompts), 1)
        for index, prompt in enumerate(prompts):
            self.sampled_groups.append((len(prompt), lengths[index * size : (index + 1) * size]))
        self.prompts += prompts
        self.computed += rollout.computed

    def metrics(self, *, reference: Groups, learned: Groups, updates: int, seconds: float) -> dict[str, float]:
        """Metrics of a step of `seconds`, with these groups under the reference and, `updates` times, in the update.

        `padding`: share of token positions in the rollout that are computed in vain: without a token, in rows that have
        finished, or again. `peak_memory`: GB, of the step on CUDA, else of the process so far. `mfu`: only if known.
        """
        cuda = self.policy.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.policy.device) if cuda else process_peak()
        metrics, shared = {"peak_memory": peak / 1e9}, num_shared(self.prompts)
        if self.computed:
            real = sum(prompt + sum(lengths) - len(lengths) for prompt, lengths in self.sampled_groups)
            metrics["padding"] = 1 - (real - shared * max(len(self.prompts) - 1, 0)) / self.computed
        if self.operations:
            count = self.operations
            needed = count.forward(self.sampled_groups, shared) + count.forward(reference, shared)
            needed += 3 * updates * count.forward(learned, shared)
            metrics["mfu"] = needed / seconds / (peak_tflops(self.policy.device, self.policy.precision) * 1e12)
        return metrics
