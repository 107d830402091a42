"""The frozen reference of a training, and copies of a model on the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor

from grpo_cli.core.model import lora
from grpo_cli.core.model.policy import Policy


@dataclass(frozen=True)
class Reference:
    """A policy that is never updated: it computes within `on_device`. With an adapter, it is the policy without it."""

    policy: Policy
    device: torch.device | None = None  # of passes, if the weights are on the host between them

    @classmethod
    def of(cls, policy: Policy, *, on_host: bool = False) -> Reference:
        """A copy of the policy as it is now, its weights kept on the host if `on_host`.

        With an adapter there is no copy: the reference shares the weights, which never change.
        """
        if policy.adapter:
            return cls(policy)
        model = host_copy(policy.model) if on_host else copy.deepcopy(policy.model)
        model.eval().requires_grad_(False)
        if on_host and torch.cuda.is_available():
            for weight in _tensors(model):
                weight.data = weight.data.pin_memory()  # several times faster to copy
        return cls(replace(policy, model=model), policy.device if on_host else None)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Temporarily copy offloaded weights to the compute device, and switch the adapter off."""
        model = self.policy.model
        home = [(weight, weight.data) for weight in _tensors(model)] if self.device else []
        try:
            for weight, data in home:
                weight.data = data.to(self.device, non_blocking=True, copy=True)
            with lora.adapter_off(model) if self.policy.adapter else nullcontext():
                yield
        finally:
            for weight, data in home:
                weight.data = data


def host_copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy on the host, made without a second copy on the device."""
    home = model.device
    copied = copy.deepcopy(model.cpu())
    model.to(home)
    return copied


def _tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    """The weights of a model and its buffers."""
    yield from model.parameters()
    yield from model.buffers()
