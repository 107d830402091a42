"""Tensors on a device that is not here: they report `cuda` or `mps`, and hold their values on the CPU.

An operator that mixes them with a CPU's tensors raises, as on the device; so does float64 on MPS. Knows no speed, no
memory and no kernel of the device's: attention is computed without flash, and Triton is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from grpo_cli.core import model as model_package
from grpo_cli.core.model import attention
from grpo_cli.core.rollout import decode

aten = torch.ops.aten
MOVES = {aten._to_copy, aten.to, aten.copy_, aten._foreach_copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # with an index of either device
GIGABYTES = 24 * 10**9


class State:
    """The device that is pretended."""

    kind = "cuda"


class OnDevice(torch.Tensor):
    """A tensor of the device. torch's C++ takes it for one of the CPU, so that autograd runs on a CPU build."""

    host: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype
        )
        made.host = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(State.kind, 0)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return State.kind == "cuda"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        self.host = values_of(other)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        places = [torch.device(part) for part in (*args, *kwargs.values()) if isinstance(part, str | torch.device)]
        dtypes = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.dtype)]
        dtypes += [part.dtype for part in args if isinstance(part, Tensor)]
        here: Tensor = self.cpu() if any(place.type == "cpu" for place in places) else self
        if dtypes and dtypes[0] != here.dtype:
            return torch.Tensor.to(here, dtypes[0])
        return here.clone() if kwargs.get("copy") else here

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.host.detach().clone()

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a device's tensor to numpy")

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin a device's tensor")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = OnDevice(self.host.detach().clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]


def values_of(tensor: Any) -> Any:
    return tensor.host if isinstance(tensor, OnDevice) else tensor


def is_here(part: object) -> bool:
    return isinstance(part, torch.device) and part.type == State.kind


def on_host(part: Any) -> Any:
    return torch.device("cpu") if is_here(part) else values_of(part)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the values, after checks that the device would make."""
    packet = func.overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
    if ours and others and packet not in MOVES and not (packet in INDEXING and isinstance(args[0], OnDevice)):
        raise RuntimeError(f"{func} mixes devices: {[tuple(tensor.shape) for tensor in tensors]}")
    if packet is aten._fused_sdp_choice:
        return 0  # plain products: what a CPU's fused kernel takes is not what the device's does
    if packet is aten.bmm and len(args) == 3:  # with `out_dtype`, on CUDA alone
        left, right, dtype = map(values_of, args)
        return OnDevice(torch.bmm(left.to(dtype), right.to(dtype)))
    options = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    args_of_host, options = tree_map(on_host, (args, options))
    found = func(*args_of_host, **options)
    made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
    if State.kind == "mps" and torch.float64 in {tensor.dtype for tensor in (*ours, *made)}:
        raise TypeError(f"MPS has no float64: {func}")
    for position, argument in enumerate(func._schema.arguments):  # in-place: the tensor that was passed
        if argument.alias_info is not None and argument.alias_info.is_write and len(func._schema.returns) <= 1:
            if not func._schema.returns:
                return None
            return args[position] if position < len(args) else kwargs[argument.name]
    return tree_map(lambda part: OnDevice(part) if isinstance(part, Tensor) else part, found)


class Devices(TorchDispatchMode):
    """Makes tensors on the device where it is named."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, OnDevice) or is_here(leaf) for leaf in tree_leaves((args, kwargs))):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def move(module: nn.Module, device: torch.device | str) -> nn.Module:
    """As `Module.to`; tied weights stay tied."""
    moved: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            values = values_of(tensor).detach().clone()
            new = OnDevice(values) if torch.device(device).type == State.kind else values
            moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return moved[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: of(tensor) for name, tensor in tensors.items() if tensor is not None})  # type: ignore
    return module


@contextmanager
def pretended(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with one device of this kind, `cuda` or `mps`."""
    import bitsandbytes  # noqa: F401 (looks for CUDA when it is imported)

    monkeypatch.setattr(State, "kind", kind)
    to = nn.Module.to

    def module_to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        place = args[0] if args else kwargs.get("device")
        return move(self, place) if isinstance(place, str | torch.device) else to(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", module_to)
    # Inference mode has no views of tensors of this kind.
    monkeypatch.setattr(torch, "inference_mode", lambda on=True: torch.no_grad() if on else nullcontext())
    monkeypatch.setattr(nn.Module, "cpu", lambda self: move(self, "cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    facts = SimpleNamespace(total_memory=GIGABYTES, major=9, minor=0, multi_processor_count=132, name="a GPU")
    known: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1,
        "get_device_properties": facts, "get_device_capability": (9, 0), "get_device_name": "a GPU",
        "mem_get_info": (GIGABYTES, GIGABYTES), "synchronize": None, "empty_cache": None, "memory_allocated": 0,
        "max_memory_allocated": 1, "reset_peak_memory_stats": None, "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "is_current_stream_capturing": False,
    }  # fmt: skip
    if kind == "cuda":
        torch._C._ensureCUDADeviceGuardSet()
        for name, value in known.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(torch.cuda, "_initialized", True)
        monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
        monkeypatch.delattr(model_package, "kernels", raising=False)
        monkeypatch.setitem(sys.modules, "grpo_cli.core.model.kernels", None)
    else:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: GIGABYTES)
    monkeypatch.setattr(decode, "record", lambda work, device: work)  # test_decode records steps
    aligned = attention.causal_lower_right  # type: ignore[attr-defined]

    def outside(*sizes: int) -> Tensor:  # the constructor of this kind of tensor does not work under a mode
        with _disable_current_modes():
            return aligned(*sizes)

    monkeypatch.setattr(attention, "causal_lower_right", outside)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Devices():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
