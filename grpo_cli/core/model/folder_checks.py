"""Check the files of a model folder before any is read: kind of file, links, the weights' index, config.json.

Does not import torch or transformers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import can_read

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MOST_LAYERS = 1_000  # building one takes milliseconds, even without weights


def check_folder(name: str, folder: Path) -> None:
    """Refuse adapters, links that leave the folder, and anything but files and folders, such as a FIFO."""
    root = Path(os.path.realpath(folder))
    inside = root.parents[1] if root.parent.name == "snapshots" else root  # Hugging Face's cache links to its blobs
    try:
        paths = sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")])
    except OSError as error:
        raise CountdownError(f"cannot list `{name}`: {error.strerror}", "check its permissions") from error
    for path in paths:
        if not Path(os.path.realpath(path)).is_relative_to(inside) or not (path.is_file() or path.is_dir()):
            raise CountdownError(f"`{path}` is not a file inside its model folder", "copy the file into the folder")
        if not can_read(path):
            raise CountdownError(f"`{path}` cannot be read", "change its permissions")
    refuse_adapter(name, (path.name for path in paths))
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        shards(name, folder / INDEX)


def refuse_adapter(name: str, files: Iterable[str]) -> None:
    """Refuse a folder or hub repository with an adapter."""
    if ADAPTER in files:
        raise CountdownError(
            f"`{name}` is an adapter without its base model ({ADAPTER})",
            "merge it into its base model with peft's `merge_and_unload()`, and save that",
        )


def weight_files(name: str, folder: Path) -> list[Path]:
    """The files of a folder's weights; none if it has no safetensors."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    names = shards(name, folder / INDEX) if (folder / INDEX).exists() else []
    for missing in (shard for shard in names if not (folder / shard).is_file()):
        raise CountdownError(f"`{folder / INDEX}` names `{missing}`, which is missing", "copy or save the model again")
    return [folder / shard for shard in names]


def shards(name: str, index: Path) -> list[str]:
    """File names in an index. Refuses anything but safetensors beside it: pickles, other folders."""
    hint = "save the model again with `save_pretrained`"
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CountdownError(f"`{index}` is not an index of weights", hint) from error
    if not names:
        raise CountdownError(f"`{index}` names no file of weights", hint)
    for shard in names:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            reason = "only safetensors files inside its folder are read"
            raise CountdownError(f"the index of `{name}` names {str(shard)[:80]!r}: {reason}", hint)
    return names


def check_config(name: str, config: dict[str, Any], causal: set[str]) -> None:
    """Refuse quantised weights, absurd depths, and architectures that are not in `causal`."""
    for part in (config, config.get("text_config")):
        layers = part.get("num_hidden_layers", 1) if isinstance(part, dict) else 1
        if not isinstance(layers, int) or layers > MOST_LAYERS:
            raise CountdownError(
                f"the config.json of `{name}` describes {str(layers)[:40]} layers", "save the model again"
            )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CountdownError(
            f"the weights of `{name}` are quantised ({str(method or 'by a method unknown')[:40]})",
            "use the original model, or a GGUF file, which is dequantised",
        )
    names = config.get("architectures") or []
    if isinstance(names, list) and names and not causal & set(map(str, names)):
        raise CountdownError(
            f"`{name}` is not a causal language model but a `{str(names[0])[:80]}`",
            "use a model whose architecture ends in ForCausalLM",
        )


def check_memory(name: str, weights: int, itemsize: int, free: int) -> None:
    """Refuse a model whose weights alone exceed the free memory."""
    needed = weights * itemsize
    if needed > free:
        raise CountdownError(
            f"the weights of `{name}` take {needed / 1e9:,.1f} GB of memory, {max(free, 0) / 1e9:,.1f} GB are free",
            "use a smaller model, or free memory",
        )
