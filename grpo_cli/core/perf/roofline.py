"""The hardware's floor of a training step's time, and the share of it that was reached.

A floor counts only necessary work, whatever the implementation does: each prompt is computed once for its group,
finished rows cost nothing, nothing is recomputed, no activation leaves the chip. A phase takes at least
max(operations / rate, bytes / bandwidth), a step the sum over its phases. With G completions c of n[c] tokens for each
prompt of L tokens, W weights of the layers' matrices, V those of the head, and A = 4 * layers * heads * head width
operations for each attending pair of tokens:

    prefill    2 W L + 2 V + A L (L + 1) / 2 for each prompt; the weights are read once
    decode     2 (W + V) (n - 1) + A sum over t < n of (L + t) for each c; the weights are read max(n) - 1 times, and
               at each of these the keys and values of the prompts (once per group) and of unfinished completions
    reference  one row [prompts | completions]: 2 W for each token, 2 V for each of a completion, A for each pair
    update     three times that forward pass (backward is twice forward) for the rows with a gradient
    optimizer  hardly any operations; reads and writes of weights, masters, gradients (twice: the norm comes before
               the step) and moments

The first token of a completion comes from the prefill. For the original's workload on an H200 (4 x 16 completions, 290
and 160 tokens, 1.5 B weights, 790 TFLOP/s, 4.3 TB/s) the sum is 0.31 s; reading the prompt's keys once for each
completion instead of each group would make it 0.33 s.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from grpo_cli.core.microbatch import process_peak
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.sampling.rollout import Rollout

COMPUTED = ("prefill", "decode", "reference", "update", "optimizer")  # phases that have a floor


@dataclass(frozen=True)
class Shape:
    """The dimensions that determine a decoder's cost."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    parameters: int

    @property
    def body(self) -> int:
        """Weights of the layers' matrices: queries and output, keys and values, and the three of the gated MLP."""
        attention = 2 * (self.heads + self.key_value_heads) * self.head_width
        return self.layers * self.width * (attention + 3 * self.intermediate)

    @property
    def head(self) -> int:
        return self.width * self.vocabulary

    @property
    def pair(self) -> int:
        """Operations for one token attending to one token, in all layers."""
        return 4 * self.layers * self.heads * self.head_width

    @property
    def cached(self) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * self.layers * self.key_value_heads * self.head_width


def shape_of(config: Any, parameters: int) -> Shape:
    """The shape of a model from its text configuration."""
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        parameters=parameters,
    )


@dataclass(frozen=True)
class Widths:
    """Bytes per weight in each place where it is stored."""

    compute: int  # in multiplications
    weight: int  # as stored
    master: int  # of its float32 master, 0 without one
    moments: int  # of both moments together

    @property
    def optimizer(self) -> int:
        """Bytes read and written per weight: the gradient twice, masters and moments both ways, the weight."""
        return 2 * self.weight + 2 * (self.master + self.moments) + self.weight * (1 if self.master else 2)


@dataclass(frozen=True)
class Work:
    """The work of a step: prompts by G completions; row p * G + g is completion g of prompt p."""

    prompts: Sequence[int]  # tokens of each
    completions: Sequence[int]  # tokens of each
    generations: int
    reference: bool = True
    learned: Sequence[int] | None = None  # rows with a nonzero gradient; all by default
    updates: int = 1


@dataclass(frozen=True)
class Cost:
    """Minimum operations and bytes of a phase."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Peak:
    """Peak rates of the hardware, per second."""

    flops: float
    bandwidth: float

    def arithmetic(self, cost: Cost) -> float:
        """Seconds for the operations alone."""
        return cost.flops / self.flops

    def floor(self, cost: Cost) -> float:
        """Minimum seconds of a phase."""
        return max(self.arithmetic(cost), cost.bytes / self.bandwidth)


def costs(shape: Shape, work: Work, widths: Widths) -> dict[str, Cost]:
    """The cost of each phase of a step."""
    weights = shape.parameters * widths.compute
    rows = range(len(work.completions))
    learned = list(rows if work.learned is None else work.learned)
    forward, back = packed(shape, work, list(rows)), packed(shape, work, learned)
    updates = work.updates if learned else 0
    return {
        "prefill": prefill(shape, work, widths),
        "decode": decode(shape, work, widths),
        "reference": Cost(forward, weights) if work.reference else Cost(0, 0),
        "update": Cost(3 * back * updates, updates * (2 * weights + shape.parameters * widths.weight)),
        "optimizer": Cost(0, updates * shape.parameters * widths.optimizer),
    }


def prefill(shape: Shape, work: Work, widths: Widths) -> Cost:
    """Each prompt once; the head only at its last token."""
    pairs = sum(map(_triangle, work.prompts))
    matrices = 2 * shape.body * sum(work.prompts) + 2 * shape.head * len(work.prompts)
    return Cost(matrices + shape.pair * pairs, shape.parameters * widths.compute)


def decode(shape: Shape, work: Work, widths: Widths) -> Cost:
    """One token of every completion at a time, until the longest ends."""
    flops = numbers = 0
    for row, length in enumerate(work.completions):
        prompt = work.prompts[row // work.generations]
        own = _triangle(length - 1)
        flops += 2 * (shape.body + shape.head) * (length - 1) + shape.pair * (prompt * (length - 1) + own)
        numbers += shape.cached * own
    for index, prompt in enumerate(work.prompts):
        group = work.completions[index * work.generations : (index + 1) * work.generations]
        numbers += shape.cached * prompt * (max(group) - 1)
    numbers += shape.parameters * (max(work.completions) - 1)
    return Cost(flops, numbers * widths.compute)


def packed(shape: Shape, work: Work, rows: Sequence[int]) -> int:
    """Operations of one forward pass over [prompts | completions], for these completions and their prompts."""
    prompts = [work.prompts[index] for index in sorted({row // work.generations for row in rows})]
    lengths = [work.completions[row] for row in rows]
    pairs = sum(map(_triangle, prompts))
    pairs += sum(
        work.prompts[row // work.generations] * length + _triangle(length)
        for row, length in zip(rows, lengths, strict=True)
    )
    matrices = 2 * shape.body * (sum(prompts) + sum(lengths)) + 2 * shape.head * sum(lengths)
    return matrices + shape.pair * pairs


def _triangle(length: int) -> int:
    """Pairs of tokens in causal attention over a sequence."""
    return length * (length + 1) // 2


def describe(by_phase: Mapping[str, Cost], peak: Peak, seconds: float) -> dict[str, float]:
    """Metrics of a step that took `seconds`.

    `floor/PHASE`: minimum seconds of a phase. `arithmetic/PHASE`: seconds of its operations at the peak rate.
    `floor_share`: floor of the step over its seconds. `mfu`: model FLOP utilisation, the step's operations over the
    hardware's capacity in that time (PaLM, arXiv 2204.02311: recomputation is not counted; unlike there, attention
    counts only the causal half).
    """
    floors = {name: peak.floor(cost) for name, cost in by_phase.items()}
    arithmetic = {name: peak.arithmetic(cost) for name, cost in by_phase.items()}
    return {
        **{f"floor/{name}": value for name, value in floors.items()},
        **{f"arithmetic/{name}": value for name, value in arithmetic.items()},
        "floor_share": sum(floors.values()) / seconds,
        "mfu": sum(arithmetic.values()) / seconds,
    }


# Hardware

# The table has data-sheet rates of dense matrices, with float32 accumulation where listed; programs do not quite reach
# them. Other devices are measured in a fraction of a second: one large matrix product and one copy larger than the
# caches. A model that fits in a cache can beat a floor based on that bandwidth.

# NVIDIA's and AMD's data sheets: (pattern of the device's name, dense bfloat16 TFLOP/s, memory GB/s), the first match.
KNOWN: tuple[tuple[str, float, float], ...] = (
    (r"B200", 2250, 8000),
    (r"H200 NVL", 836, 4800),
    (r"H200", 989, 4800),
    (r"H100 NVL", 836, 3900),
    (r"H100 PCIe", 756, 2000),
    (r"H100", 989, 3350),
    (r"A100 80GB PCIe", 312, 1935),
    (r"A100.*80GB", 312, 2039),
    (r"A100", 312, 1555),
    (r"L40S", 362, 864),
    (r"L4$", 121, 300),
    (r"A10G", 70, 600),
    (r"A10$", 125, 600),
    (r"RTX 6000 Ada", 364, 960),
    (r"RTX 5090$", 209.5, 1792),
    (r"RTX 4090$", 165.2, 1008),
    (r"RTX 3090 Ti", 80, 1008),
    (r"RTX 3090$", 71, 936),
    (r"MI300X", 1307, 5300),
)
# Without bfloat16 matrix units, so bfloat16 is measured: T4, V100.
MATRIX, COPY, REPEATS = 1024, 2**27, 8  # rows and columns; bytes per copy, twice that are moved


@dataclass(frozen=True)
class Hardware:
    """A device's peak rates, and their source: `table` or `measured`."""

    name: str
    peak: Peak
    source: str

    def record(self) -> dict[str, object]:
        """For environment.json, in TFLOP/s and GB/s."""
        rates = {"tflops": self.peak.flops / 1e12, "gigabytes_per_second": self.peak.bandwidth / 1e9}
        return {"name": self.name, "source": self.source, **rates}


def known(name: str, dtype: torch.dtype) -> Peak | None:
    """The peaks of a GPU by its device name, or None; the table has no float32 rates."""
    if dtype != torch.bfloat16:
        return None
    matching = ((rate, bandwidth) for pattern, rate, bandwidth in KNOWN if re.search(rf"\b{pattern}", name))
    return next((Peak(rate * 1e12, bandwidth * 1e9) for rate, bandwidth in matching), None)


@cache
def hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    """The hardware of a device in `dtype`; measured once per process if it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    peak = known(name, dtype) if device.type == "cuda" else None
    return Hardware(name, peak or measure(device, dtype), "table" if peak else "measured")


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of a few matrix products in `dtype` and copies, with torch's current number of threads."""
    with torch.inference_mode():
        left, right = (torch.ones(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(left)
        source = torch.ones(COPY, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        multiplied = _fastest(lambda: torch.mm(left, right, out=product), device)
        copied = _fastest(lambda: target.copy_(source), device)
    return Peak(2 * MATRIX**3 / multiplied, 2 * COPY / copied)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after a warm-up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(REPEATS))


# A step


def hardware_of(policy: Policy) -> Hardware:
    """The peaks of the policy's device in the precision of its computations."""
    return hardware(policy.device, torch.bfloat16 if policy.precision.startswith("bf16") else torch.float32)


def widths(policy: Policy, optimizer: torch.optim.Optimizer) -> Widths:
    """Bytes per weight in each place where this policy and this optimizer store it."""
    stored = next(policy.model.parameters()).element_size()
    master = 4 if getattr(optimizer, "masters", None) else 0
    inner = getattr(optimizer, "inner", optimizer)
    moments = 2 if type(inner).__name__ == "AdamW8bit" else 2 * (master or stored)
    return Widths(2 if policy.precision.startswith("bf16") else 4, stored, master, moments)


@dataclass
class Meter:
    """Measures one step: collects its rollouts and its update, and computes the metrics."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    rollouts: list[tuple[Work, int]] = field(default_factory=list)  # each with its computed token positions

    def __post_init__(self) -> None:
        self.shape = shape_of(
            self.policy.model.config.get_text_config(), sum(weight.numel() for weight in self.policy.model.parameters())
        )
        if self.policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.policy.device)

    def sampled(self, prompts: Sequence[Sequence[int]], rollout: Rollout) -> None:
        """Count a rollout of these prompts (token ids)."""
        if not prompts:
            return
        lengths = list(map(len, rollout.completions))
        work = Work(list(map(len, prompts)), lengths, len(lengths) // len(prompts))
        self.rollouts.append((work, rollout.computed))

    def metrics(self, work: Work, *, seconds: float) -> dict[str, float]:
        """Metrics of a step that learned `work` and took `seconds`.

        `padding`: share of computed token positions in the rollout without a token, including finished rows that are
        still computed; the update's packed row has none. `peak_memory`: GB, of the step on CUDA, else of the process so
        far.
        """
        bytes_of = widths(self.policy, self.optimizer)
        by_phase = costs(self.shape, work, bytes_of)
        for phase, price in (("prefill", prefill), ("decode", decode)):
            parts = [price(self.shape, one, bytes_of) for one, _ in self.rollouts]
            by_phase[phase] = Cost(sum(part.flops for part in parts), sum(part.bytes for part in parts))
        real = computed = 0
        for one, places in self.rollouts:
            real += sum(one.prompts) + sum(length - 1 for length in one.completions)
            computed += places
        return {
            **describe(by_phase, hardware_of(self.policy).peak, seconds),
            "padding": 1 - real / computed,
            "peak_memory": _peak_bytes(self.policy.device) / 1e9,
        }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak()
