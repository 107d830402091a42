"""What a pass through a model takes up in memory: the real pass, run on the meta device and kept account of.

The meta device has shapes and no memory, so a pass of any size is over in a moment. Real tensors are counted alike,
which is how the tests know that it is right. Knows neither settings nor what memory there is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_cli.core.model import qwen2
from grpo_cli.core.model.attention import Packed, Prefill
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.sampling.decode import choose

Amounts = dict[str, int]  # bytes by what they hold


class Ledger(TorchDispatchMode):
    """Keeps account of every storage that comes and goes while it is on, but for those of the tensors `known`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[torch.Size, int]] = []  # of the storages, in the order in which they came
        self.events: list[int] = []  # number of a storage that came, or its complement if it went
        self.numbers: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, object] = {}

    def __torch_dispatch__(
        self, function: Callable[..., object], types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> object:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self.numbers:
            return
        number = self.numbers[key] = len(self.shapes)
        self.shapes.append((tensor.shape, storage.nbytes()))
        self.events.append(number)

        def gone(_: object) -> None:
            del self.numbers[key], self._alive[key]
            self.events.append(~number)

        self._alive[key] = weakref.ref(storage, gone)

    def peak(self, start: int, end: int, kind: Callable[[int], str]) -> Amounts:
        """Bytes by kind of storage at the largest sum between two moments, which are counted in events."""
        changes = (self.shapes[event][1] if event >= 0 else -self.shapes[~event][1] for event in self.events[:end])
        sums = [0, *accumulate(changes)]
        moment = max(range(min(start, end), end + 1), key=sums.__getitem__)
        gone = {~event for event in self.events[:moment] if event < 0}
        amounts: Amounts = {}
        for number in (event for event in self.events[:moment] if event >= 0 and event not in gone):
            amounts[kind(number)] = amounts.get(kind(number), 0) + self.shapes[number][1]
        return amounts


def traced(policy: Policy, sequences: Sequences, *, learn: bool, again: bool = False) -> list[Amounts]:
    """What is live at the peaks of a pass over the completions: activations, logits, gradients.

    Two peaks if it is to `learn`: until the last layer's weights have their gradients, and since the first's get them;
    each of them grows by the same amount with every layer. `again` says that gradients are there already, of other
    micro-batches. Leaves no gradients.
    """
    model = policy.model
    weights, layers = list(model.parameters()), model.get_decoder().layers
    gradients = [torch.empty_like(weight) for weight in weights] if again else []
    for weight, gradient in zip(weights, gradients, strict=False):
        weight.grad = gradient
    ledger = Ledger([*weights, *gradients, *model.buffers()])
    first, last = list[int](), list[int]()
    hooks = [
        weight.register_post_accumulate_grad_hook(lambda _, moments=moments: moments.append(len(ledger.events)))
        for layer, moments in ((layers[0], first), (layers[-1], last))
        for weight in layer.parameters()
    ]
    try:
        with ledger, torch.set_grad_enabled(learn):
            logprobs, _ = policy.logprobs(sequences, temperature=1.0)
            if learn:
                logprobs.sum().backward()
        found = (weight.grad for weight in weights if weight.grad is not None)
        held = {ledger.numbers.get(gradient.untyped_storage()._cdata) for gradient in found}
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights:
            weight.grad = None
    vocabulary = model.config.get_text_config().vocab_size

    def kind(number: int) -> str:
        shape = ledger.shapes[number][0]
        if number in held:
            return "gradients"
        return "logits" if len(shape) > 1 and shape[-1] == vocabulary else "activations"

    end = len(ledger.events)
    spans = [(0, last[-1]), (first[0], end)] if learn else [(0, end)]
    return [ledger.peak(*span, kind) for span in spans]


def traced_prefill(policy: Policy, prompts: int, longest: int) -> Amounts:
    """What is live at the peak of reading P prompts of L tokens before completions are sampled."""
    tokens = torch.zeros(prompts, longest, dtype=torch.long, device=policy.device)
    positions = torch.arange(longest, device=policy.device).expand_as(tokens)
    prefill = Prefill()
    ledger = Ledger([tokens, positions, *policy.model.parameters(), *policy.model.buffers()])
    with ledger, torch.no_grad():
        policy.logits(policy.hidden(tokens, positions, prefill)[:, -1])
    return ledger.peak(0, len(ledger.events), lambda _: "activations")


@cache
def sampling_room(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes that choosing the next tokens of B rows takes, the logits included."""
    with torch.device("meta"):
        logits, uniform = torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, dtype=torch.float64)
        with Ledger([]) as ledger:
            choose(logits, uniform, 1.0)
    room: int = logits.nbytes + sum(ledger.peak(0, len(ledger.events), lambda _: "").values())
    return room


@dataclass(frozen=True)
class Outline(Policy):
    """A policy on the meta device that goes through its passes as one on a CPU or a GPU would."""

    written: bool = False

    def _hidden_of_row(self, tokens: Tensor, plan: Packed) -> Tensor:
        if not self.written or self.model.is_activation_checkpointing:
            return super()._hidden_of_row(tokens, plan)
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        written = qwen2.Pass(self.model, longest=plan.positions.numel(), dtype=dtype)
        return written.hidden(tokens, plan.positions[0], plan, packed=True)


@contextmanager
def checkpointed(model: Any, *, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing while this lasts, as `load` turns it on."""
    if wanted:
        model.activation_checkpointing_enable()
        model.train()
    try:
        yield
    finally:
        if wanted:
            model.activation_checkpointing_disable()
            model.eval()
