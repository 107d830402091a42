"""What a training step is measured by, beside its time: its floor, utilisation, padding and memory.

Joins what a step computed with the formulas of `cost` and the peaks of `hardware`. Knows neither puzzles nor rewards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from grpo_cli.core.model.policy import Policy
from grpo_cli.core.perf import cost
from grpo_cli.core.perf.hardware import Hardware, hardware
from grpo_cli.core.sampling.rollout import Rollout


def hardware_of(policy: Policy) -> Hardware:
    """The peaks of the policy's device in the precision that it computes in."""
    return hardware(policy.device, torch.bfloat16 if policy.precision.startswith("bf16") else torch.float32)


def widths(policy: Policy, optimizer: torch.optim.Optimizer) -> cost.Widths:
    """Bytes of each weight in each place where this policy and this optimizer keep it."""
    stored = next(policy.model.parameters()).element_size()
    master = 4 if getattr(optimizer, "masters", None) else 0
    inner = getattr(optimizer, "inner", optimizer)
    moments = 2 if type(inner).__name__ == "AdamW8bit" else 2 * (master or stored)
    return cost.Widths(2 if policy.precision.startswith("bf16") else 4, stored, master, moments)


@dataclass
class Meter:
    """Measures one step: told each rollout and what was learned from, it has the step's metrics."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    rollouts: list[tuple[cost.Work, int]] = field(default_factory=list)  # each with the token places it computed

    def __post_init__(self) -> None:
        self.shape = cost.shape_of(
            self.policy.model.config.get_text_config(), sum(weight.numel() for weight in self.policy.model.parameters())
        )
        if self.policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.policy.device)

    def sampled(self, prompts: Sequence[Sequence[int]], rollout: Rollout) -> None:
        """Count a rollout, of token ids."""
        if not prompts:
            return
        lengths = list(map(len, rollout.completions))
        work = cost.Work(list(map(len, prompts)), lengths, len(lengths) // len(prompts))
        self.rollouts.append((work, rollout.computed))

    def metrics(self, work: cost.Work, *, seconds: float) -> dict[str, float]:
        """Metrics of a step that learned `work` and took `seconds`.

        `padding`: share of the token places computed in the rollout that are of no token, ended rows that are still
        computed among them; the packed row of the update has none. `peak_memory`: GB, of the step on CUDA, else of the
        process so far.
        """
        bytes_of = widths(self.policy, self.optimizer)
        found = cost.costs(self.shape, work, bytes_of)
        for phase, price in (("prefill", cost.prefill), ("decode", cost.decode)):
            parts = [price(self.shape, one, bytes_of) for one, _ in self.rollouts]
            found[phase] = cost.Cost(sum(part.flops for part in parts), sum(part.bytes for part in parts))
        real = computed = 0
        for one, places in self.rollouts:
            real += sum(one.prompts) + sum(length - 1 for length in one.completions)
            computed += places
        return {
            **cost.describe(found, hardware_of(self.policy).peak, seconds),
            "padding": 1 - real / computed,
            "peak_memory": _peak_bytes(self.policy.device) / 1e9,
        }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # it has no such count
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
