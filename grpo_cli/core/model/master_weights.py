"""Float32 masters of bfloat16 weights: the optimizer updates the masters; the weights are the masters rounded.

Near 0.02, neighbouring bfloat16 weights are 1.2e-4 apart, so most small steps would be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

PART_WEIGHTS = 2**27  # weights per float32 conversion of gradients: half a gigabyte


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of bfloat16 `weights`; `build` makes the inner one for their float32 copies.

    Its parameter groups hold the masters. Gradients are converted to float32 for a few weights at a time.
    """

    def __init__(
        self, weights: Iterable[torch.nn.Parameter], build: Callable[[list[Tensor]], torch.optim.Optimizer]
    ) -> None:
        self.weights = list(weights)
        self.masters = [weight.detach().float().requires_grad_() for weight in self.weights]
        self.inner = build(self.masters)
        super().__init__(self.masters, defaults={})
        self._follow()

    def _follow(self) -> None:
        """Share param_groups and state with the wrapped optimizer."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update the masters with the gradients of the weights, and round them into the weights in place."""
        for part in self._parts():
            for weight, master in part:
                master.grad = None if weight.grad is None else weight.grad.float()
            self.inner.step()  # skips masters without a gradient
            torch._foreach_copy_([weight for weight, _ in part], [master for _, master in part])
            for _, master in part:
                master.grad = None

    def _parts(self) -> Iterator[list[tuple[torch.nn.Parameter, Tensor]]]:
        part: list[tuple[torch.nn.Parameter, Tensor]] = []
        count = 0
        for weight, master in zip(self.weights, self.masters, strict=True):
            if part and count + weight.numel() > PART_WEIGHTS:
                yield part
                part, count = [], 0
            part.append((weight, master))
            count += weight.numel()
        yield part

    def state_dict(self) -> dict[str, Any]:
        """The masters, and the state of the wrapped optimizer."""
        return {"masters": self.masters, "inner": self.inner.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the weights become its masters, rounded."""
        for weight, master, saved in zip(self.weights, self.masters, state_dict["masters"], strict=True):
            master.copy_(saved)
            weight.copy_(master)
        self.inner.load_state_dict(state_dict["inner"])
        self._follow()
