"""Checks of a hub model before its weights are downloaded. Offline, cached models are used unchecked."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.folder_checks import INDEX, WEIGHTS, check_memory, refuse_adapter, shards


def check_repository(name: str) -> None:
    """Refuse adapters, models without safetensors and, if the hub is out of reach, models that are not cached."""
    info = _info(name)
    if info is None and not isinstance(try_to_load_from_cache(name, "config.json", constants.HF_HUB_CACHE), str):
        raise CountdownError(
            f"`{name}` is not on this machine, and the hub is out of reach",
            "use the built-in model (`builtin`; to train it, `--preset builtin`), or copy the model here and name its"
            " folder or GGUF file instead",
        )
    files = [file.rfilename for file in info.siblings or []] if info else []
    if "config.json" not in files:
        refuse_adapter(name, files)
    if files and not {WEIGHTS, INDEX} & set(files):
        raise CountdownError(f"`{name}` has no weights as safetensors", "use a model that has them")


def check_download(name: str, *, itemsize: int, free: int) -> None:
    """Refuse weights that do not fit into `free` bytes of memory, and an index with anything but safetensors."""
    info = _info(name)
    if info is None:
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = [WEIGHTS] if WEIGHTS in sizes else _indexed(name)
    if info.safetensors is not None:
        check_memory(name, info.safetensors.total, itemsize, free)
    check_memory(name, sum(sizes.get(file, 0) for file in names), 1, free)


def _indexed(name: str) -> list[str]:
    try:
        index = hf_hub_download(name, INDEX)
    except Exception:  # as below
        return []
    return shards(name, Path(index))


@cache
def _info(name: str) -> ModelInfo | None:
    """The hub's data about a model; empty if the hub refuses, which loading reports; None without a connection."""
    try:
        return HfApi().model_info(name, files_metadata=True, timeout=10)
    except HfHubHTTPError:
        return ModelInfo(id=name)  # type: ignore[no-untyped-call]
    except Exception:  # releases of the library differ in what they raise
        return None
