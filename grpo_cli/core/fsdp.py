"""A model whose weights are sharded over ranks (FSDP2), and its checkpoints.

Each rank keeps its shard of every weight, gradient and moment; a layer's full weights exist only while it computes. The
optimizer is torch's AdamW, which works element by element on DTensors; 8-bit AdamW quantises blocks of whole tensors
and does not support them. A full copy of the weights, to sample with and to save, is gathered once per step; if a
vLLM server samples, only the first rank has one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.reference import host_copy
from grpo_cli.core.world import World


def sharded(policy: Policy, world: World, device: torch.device) -> Policy:
    """The policy with its weights sharded by layers over the ranks' devices.

    Weights are float32, unless the precision is pure bfloat16. They are copied from the host unit by unit, so the
    device never holds all of them. Gradients are summed over ranks, not averaged, as for replicated weights.
    """
    if isinstance(policy.path, PlainPath):
        raise CountdownError(
            f"`{policy.name}` runs on the plain path, which does not support sharded weights", "give `--no-shard`"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    model = host_copy(policy.model).to(torch.bfloat16 if policy.precision == "bf16" else torch.float32)
    half = policy.precision == "bf16-master" and device.type == "cuda"
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in cast(Any, model.get_decoder()).layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    learns = any(weight.requires_grad for weight in model.parameters())
    # By default, the last unit stays gathered until the backward pass, which a reference never makes.
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=None if learns else True)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo supports no other scaled sum
    return replace(policy, model=model, is_sharded=True)


@torch.no_grad()
def gather(source: Policy, target: Policy) -> None:
    """Copy the full weights of a sharded policy into a plain one, tensor by tensor; all ranks take part."""
    for mine, copy in zip(source.model.parameters(), target.model.parameters(), strict=True):
        whole = cast(Any, mine).full_tensor()
        if not copy.is_meta:
            copy.copy_(whole)


def keep_for_saving(policy: Policy, world: World) -> None:
    """Free a full copy that nobody samples with: the first rank keeps it on the host, to save it, others nothing."""
    policy.model.to("cpu" if world.is_first else "meta")
    policy.model.tie_weights()  # `to` gives each of several tied weights a tensor of its own on `meta`


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of it if it is not sharded."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """The full tensor; all ranks of a sharded one take part."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_shards(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's weights and moments; any number of ranks can `load_shards` them."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_tensors(model, optimizer), checkpoint_id=folder)


def load_shards(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the weights and moments that `save_shards` wrote, into a sharded or a plain model."""
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = _tensors(model, optimizer)
    load(tensors, checkpoint_id=folder)


def spread(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the optimizer state of a full model, in the order of its weights."""
    from torch.distributed.tensor import distribute_tensor

    tensors = _tensors(model, optimizer)
    with torch.no_grad():
        for index, (name, weight) in enumerate(model.named_parameters()):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = state["state"][index][key]
                if key != "step":
                    saved = distribute_tensor(saved, cast(Any, weight).device_mesh, cast(Any, weight).placements)
                tensors[f"{key}/{name}"].copy_(saved)


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a training by name, where it is stored."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}
            state["exp_avg_sq"] = torch.zeros_like(weight)
        tensors[f"weight/{name}"] = weight.detach()
        tensors |= {f"{key}/{name}": state[key].detach() for key in ("step", "exp_avg", "exp_avg_sq")}
    return tensors
