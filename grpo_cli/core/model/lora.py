"""Low-rank adapters (LoRA, arXiv 2106.09685) and 4-bit base weights (QLoRA, arXiv 2305.14314).

peft makes and runs the layers, bitsandbytes the 4-bit ones. Only the adapter learns: the model with its adapter off is
the reference, and no second copy is held. Knows neither training nor runs.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError

ADAPTER = "default"  # peft's name of the only adapter
PREFIX = "base_model.model."  # of weights in an adapter's file
PERTURBATION = 0.05  # standard deviation of B while the adapter is checked


@dataclass(frozen=True)
class Lora:
    """An adapter of this rank on the linear layers `targets`, all of them if (); `nf4`: on a 4-bit base model."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    nf4: bool = False
    seed: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Lora | None:
        """The adapter in the settings, or None if there is none; CountdownError if others conflict."""
        model, train = settings.model, settings.train
        if not model.lora_rank:
            return None
        for package in ("peft", *(["bitsandbytes"] if model.quantize == "nf4" else [])):
            if find_spec(package) is None:
                raise CountdownError(
                    f"`--lora-rank` needs the package `{package}`", "pip install 'countdown-grpo[lora]'"
                )
        if settings.ranks.shard:
            raise CountdownError("`--shard` trains all weights, not adapters", "leave out `--shard` or `--lora-rank`")
        if train.warm_start:
            raise CountdownError(
                "`--warm-start` trains all weights, not adapters",
                "train one step without `--lora-rank`, then start from that run's `warm_start` folder with `--model`",
            )
        names = () if model.lora_targets == "all" else tuple(part.strip() for part in model.lora_targets.split(","))
        return cls(model.lora_rank, model.lora_alpha, names, model.quantize == "nf4", train.seed)


def target_names(model: Any, lora: Lora) -> list[str]:
    """Names of the modules that get adapters; raises CountdownError for a name that no linear layer has."""
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    unknown = [name for name in lora.targets if name not in linear]
    if unknown or not linear:
        raise CountdownError(
            f"no linear layer of {type(model).__name__} is called `{unknown[0] if unknown else 'any'}`",
            f"give `--lora-targets` some of: {', '.join(sorted(linear)) or 'none'}",
        )
    return sorted(lora.targets or linear)


def adapter_sizes(model: Any, lora: Lora) -> tuple[int, int, int]:
    """(weights of the adapter, weights of the layers that it adapts, those of the largest such layer)."""
    names = set(target_names(model, lora))
    shapes = [module.weight.shape for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    sizes = [math.prod(shape) for shape in shapes]
    return lora.rank * sum(map(sum, shapes)), sum(sizes), max(sizes)


def adapt(model: Any, lora: Lora, *, name: str) -> None:
    """Quantize the layers if asked for, and add adapters to them, which alone learn. B starts at 0, A from the seed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel for inference alone
    names = target_names(model, lora)
    if lora.nf4:
        _quantize(model, set(names))
    peft = import_module("peft")
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=names, base_model_name_or_path=name, task_type="CAUSAL_LM"
    )
    model.is_loaded_in_4bit = lora.nf4  # how peft tells layers apart
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        peft.inject_adapter_in_model(config, model, ADAPTER)
    del model.is_loaded_in_4bit
    model.adapter_config = config
    for layer in adapted(model).values():
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER].weight.data = part[ADAPTER].weight.data.float()
    model.eval()


def _quantize(model: Any, names: set[str]) -> None:
    bitsandbytes = import_module("bitsandbytes")
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name not in names:
            continue
        layer = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=module.weight.dtype,
            quant_type="nf4",
        )
        layer.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = module.bias
        layer.support_avx512bf16_for_cpu = False  # its kernel for inference has no backward pass
        setattr(model.get_submodule(parent), name, layer.to(module.weight.device))


def adapted(model: nn.Module) -> dict[str, Any]:
    """Every layer with an adapter, by name; {} if there are none."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run the base model within this context."""
    layers = adapted(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def merged_weights(model: nn.Module) -> Iterator[None]:
    """Base layers hold W + B A alpha / r within this context, for code that reads weights; not for calling layers."""
    bases = [(layer.get_base_layer().weight, merged(layer)) for layer in adapted(model).values()]
    saved = [weight.data for weight, _ in bases]
    try:
        for weight, whole in bases:
            weight.data = whole
        yield
    finally:
        for (weight, _), data in zip(bases, saved, strict=True):
            weight.data = data


@torch.no_grad()
def merged(layer: Any) -> Tensor:
    """W + B A alpha / r, of 4-bit weights dequantized."""
    weight: Tensor = layer.get_base_layer().weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        weight = import_module("bitsandbytes").functional.dequantize_4bit(weight.data, state)
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    return (weight.float() + delta.to(weight.device)).to(weight.dtype)


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Adapters whose B is random and not 0, so that a check of the model sees them."""
    generator = torch.Generator().manual_seed(0)
    weights = [layer.lora_B[ADAPTER].weight for layer in adapted(model).values()]
    for weight in weights:
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * PERTURBATION)
    try:
        yield
    finally:
        for weight in weights:
            weight.data.zero_()


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the base model, under its own names."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not _is_adapter(name)
    }


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the base model with the adapter merged in."""
    layers = adapted(model)
    state = {
        name: tensor
        for name, tensor in base_state(model).items()
        if not any(name.startswith(f"{path}.weight") for path in layers)  # with the constants of 4-bit weights
    }
    return state | {f"{path}.weight": merged(layer) for path, layer in layers.items()}


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter as peft does: PeftModel.from_pretrained(base, folder) reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.detach().contiguous()
        for name, tensor in model.named_parameters()
        if _is_adapter(name)
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.adapter_config.save_pretrained(str(folder))  # type: ignore[operator, union-attr]
    shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")  # others may read it too


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Restore what `save_adapter` wrote."""
    saved: Mapping[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            parameter.copy_(saved[PREFIX + name.replace(f".{ADAPTER}.", ".")])


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
