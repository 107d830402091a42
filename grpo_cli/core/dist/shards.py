"""A model whose weights are spread over the ranks, for what does not fit on one: FSDP2, and its checkpoints.

Each rank keeps its shard of every weight, of its gradient and of its moments; a layer's weights are whole only while it
computes. The optimizer is torch's AdamW, since it works on DTensors element by element: the 8-bit state of bitsandbytes
is quantised in blocks of a whole tensor, by kernels that know no DTensor. Completions are sampled by a copy with all
weights, gathered once per step. Knows neither the algorithm nor where a run keeps anything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from grpo_cli.core.dist.ranks import Solo
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy, host_copy


def sharded(policy: Policy, ranks: Solo, device: torch.device) -> Policy:
    """The policy with every rank holding its part of the weights on its device, by layers.

    They are in float32, unless the precision is bfloat16 alone, and come from the host unit by unit, so that the device
    never holds all of them. Ranks add up their gradients, as `Gradients` of whole weights do; they take no mean.
    """
    if policy.plain:
        raise CountdownError(
            f"`{policy.name}` runs on the plain path, which does not support sharded weights", "give `--no-shard`"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    model = host_copy(policy.model).to(torch.bfloat16 if policy.precision == "bf16" else torch.float32)
    half = policy.precision == "bf16-master" and device.type == "cuda"
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in cast(Any, model.get_decoder()).layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    learns = any(weight.requires_grad for weight in model.parameters())
    # By default the ends stay whole until a backward pass, which a reference never makes.
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=None if learns else True)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other sum that is scaled
    return replace(policy, model=model, is_sharded=True, samplers=[], works_on=None)


@torch.no_grad()
def gather(source: Policy, target: Policy) -> None:
    """Put the whole weights of a sharded policy into those of a plain one, tensor by tensor; all ranks take part."""
    for mine, whole in zip(source.model.parameters(), target.model.parameters(), strict=True):
        whole.copy_(cast(Any, mine).full_tensor())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which is all of one that is not sharded."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; the ranks of a sharded one take part."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_shards(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and moments, each rank its own; whatever number of ranks can `load_shards` them."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_tensors(model, optimizer), checkpoint_id=folder)


def load_shards(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take up the weights and moments that `save_shards` wrote, whether or not the model is sharded."""
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = _tensors(model, optimizer)
    load(tensors, checkpoint_id=folder)


def spread(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up the state of the optimizer of a whole model, by the order of its weights."""
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
    """Every tensor of a training by its name, where it lies."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}
            state["exp_avg_sq"] = torch.zeros_like(weight)
        tensors[f"weight/{name}"] = weight.detach()
        tensors |= {f"{key}/{name}": state[key].detach() for key in ("step", "exp_avg", "exp_avg_sq")}
    return tensors
