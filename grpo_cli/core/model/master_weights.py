"""Float32 masters of bfloat16 weights: the optimizer moves the masters, and the weights are the masters rounded.

A bfloat16 weight near 0.02 has neighbours 1.2e-4 away, so that most small steps would be rounded away. Knows neither
what the weights are for nor which optimizer it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2**27  # weights whose gradients are in float32 at the same time: half a gigabyte


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of bfloat16 `weights`, made by `build` from the float32 copies that it moves in their stead.

    Its parameter groups hold the masters. Gradients are made float32 for a few weights at a time.
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
        """The groups and the state are those of the optimizer within."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the weights."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Move the masters by the gradients of the weights, and round them to the weights, where they lie."""
        for part in self._parts():
            for weight, master in part:
                master.grad = None if weight.grad is None else weight.grad.float()
            self.inner.step()  # passes over what has no gradient
            torch._foreach_copy_([weight for weight, _ in part], [master for _, master in part])
            for _, master in part:
                master.grad = None

    def _parts(self) -> Iterator[list[tuple[torch.nn.Parameter, Tensor]]]:
        part: list[tuple[torch.nn.Parameter, Tensor]] = []
        count = 0
        for weight, master in zip(self.weights, self.masters, strict=True):
            if part and count + weight.numel() > AT_ONCE:
                yield part
                part, count = [], 0
            part.append((weight, master))
            count += weight.numel()
        yield part

    def state_dict(self) -> dict[str, Any]:
        """The masters, and the state of the optimizer within."""
        return {"masters": self.masters, "inner": self.inner.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; the weights become its masters, rounded."""
        for weight, master, saved in zip(self.weights, self.masters, state_dict["masters"], strict=True):
            master.copy_(saved)
            weight.copy_(master)
        self.inner.load_state_dict(state_dict["inner"])
        self._follow()
