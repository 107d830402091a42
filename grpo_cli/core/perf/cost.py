"""What a training step must cost at least: operations and bytes of each phase, and the seconds that hardware needs.

All formulas are here, in plain Python; nothing is measured. A floor counts what cannot be left out, not what an
implementation does: each prompt is computed once for its group, rows that have ended cost nothing, nothing is
recomputed, no activation leaves the chip. A phase takes at least max(operations / rate, bytes / bandwidth), a step the
sum over its phases. With G completions c of n[c] tokens for each prompt of L tokens, W weights of the layers' matrices,
V those of the head, and A = 4 * layers * heads * head width operations for each pair of tokens that attend:

    prefill    2 W L + 2 V + A L (L + 1) / 2 for each prompt; the weights are read once
    decode     2 (W + V) (n - 1) + A sum over t < n of (L + t) for each c; the weights are read max(n) - 1 times, and
               at each of these the keys and values of the prompts (once for the group) and completions that go on
    reference  one row [prompts | completions]: 2 W for each token, 2 V for each of a completion, A for each pair
    update     three times that forward pass (backward is twice forward) for the rows that matter
    optimizer  no operations to speak of; reads and writes of weights, masters, gradients (twice: the norm comes before
               the step) and moments

The first token of a completion comes from the prefill. Of the original's workload on an H200 (4 x 16 completions, 290
and 160 tokens, 1.5 B weights, 790 TFLOP/s, 4.3 TB/s) the sum is 0.31 s; reading the prompt's keys once for each
completion instead of each group would make it 0.33 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPUTED = ("prefill", "decode", "reference", "update", "optimizer")  # phases that have a floor


@dataclass(frozen=True)
class Shape:
    """The numbers that a decoder's cost depends on."""

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
        """Operations for one token that attends to one token, in all layers."""
        return 4 * self.layers * self.heads * self.head_width

    @property
    def cached(self) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * self.layers * self.key_value_heads * self.head_width


def shape_of(config: Any, parameters: int) -> Shape:
    """The shape of a model from its text configuration, as transformers names things."""
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
    """Bytes of one weight in each place where it is kept."""

    compute: int  # as it is multiplied
    weight: int  # as it is stored
    master: int  # of its float32 master, 0 without one
    moments: int  # of both moments together

    @property
    def optimizer(self) -> int:
        """Bytes read and written for each weight: the gradient twice, masters and moments both ways, the weight."""
        return 2 * self.weight + 2 * (self.master + self.moments) + self.weight * (1 if self.master else 2)


@dataclass(frozen=True)
class Work:
    """What a step computes: prompts by G completions, row p * G + g being completion g of prompt p."""

    prompts: Sequence[int]  # tokens of each
    completions: Sequence[int]  # tokens of each
    generations: int
    reference: bool = True
    learned: Sequence[int] | None = None  # rows with a gradient that is not zero; all by default
    updates: int = 1


@dataclass(frozen=True)
class Cost:
    """What a phase must at least do."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Peak:
    """What hardware can do in a second."""

    flops: float
    bandwidth: float

    def arithmetic(self, cost: Cost) -> float:
        """Seconds for the operations alone."""
        return cost.flops / self.flops

    def floor(self, cost: Cost) -> float:
        """Seconds that a phase takes at least."""
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
    """Each prompt once; the head at its last token alone."""
    pairs = sum(map(_triangle, work.prompts))
    matrices = 2 * shape.body * sum(work.prompts) + 2 * shape.head * len(work.prompts)
    return Cost(matrices + shape.pair * pairs, shape.parameters * widths.compute)


def decode(shape: Shape, work: Work, widths: Widths) -> Cost:
    """A token of every completion at a time, until the longest ends."""
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
    """Operations of one forward pass over [prompts | completions], of these completions and their prompts."""
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


def describe(found: Mapping[str, Cost], peak: Peak, seconds: float) -> dict[str, float]:
    """Metrics of a step that took `seconds`.

    `floor/PHASE`: seconds that a phase takes at least. `arithmetic/PHASE`: its operations at the full rate, in seconds.
    `floor_share`: the floor of the step over its seconds. `mfu`: model FLOP utilisation, the step's operations over
    those that the hardware could have done in its time (PaLM, arXiv 2204.02311: recomputation is not counted; unlike
    there, attention counts the causal half alone).
    """
    floors = {name: peak.floor(cost) for name, cost in found.items()}
    arithmetic = {name: peak.arithmetic(cost) for name, cost in found.items()}
    return {
        **{f"floor/{name}": value for name, value in floors.items()},
        **{f"arithmetic/{name}": value for name, value in arithmetic.items()},
        "floor_share": sum(floors.values()) / seconds,
        "mfu": sum(arithmetic.values()) / seconds,
    }
