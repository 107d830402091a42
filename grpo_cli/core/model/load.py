"""Load a model and its tokenizer, and check both: files, sizes, weights, chat template, end-of-sequence ids.

Pickles and remote code are never touched.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from transformers.models.auto import modeling_auto

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.folder_checks import ADAPTER, check_config, check_memory, weight_files
from grpo_cli.core.model.gguf import ENDS, unpacked
from grpo_cli.core.model.hub import check_download, check_repository
from grpo_cli.core.model.names import is_gguf, require_model
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import ComputePath, Policy, checkpoint_layers, set_attention
from grpo_cli.core.model.templates import PROBE, check_template, encode

CAUSAL = {
    architecture
    for names in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for architecture in ([names] if isinstance(names, str) else names)
}
FLOATS = ("F16", "BF16", "F32", "F64")
RESAVE = "use an earlier save of the model"
BUILTIN = Path(__file__).parents[1] / "builtin" / "model"


def detect_device(name: str) -> torch.device:
    """The device `name`; "auto" is CUDA if available, else the CPU. MPS has never been run."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available[name]:
        others = ", ".join(f"`{device}`" for device, usable in available.items() if usable)
        raise CountdownError(f"device `{name}` is not available here", f"use `--device auto`, or one of {others}")
    return torch.device(name)


def set_threads(count: int) -> None:
    """Compute with `count` CPU threads, at most one per core, or with torch's default if it is 0."""
    if count:
        torch.set_num_threads(min(count, os.cpu_count() or count))


def free_memory(device: torch.device) -> int:
    """Bytes of memory that nobody uses on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def detect_precision(name: str, device: torch.device) -> str:
    """The precision `name`; "auto" is bfloat16 arithmetic over float32 weights if the hardware supports it."""
    if name != "auto":
        return name
    if device.type == "cpu":
        # torch has no public query for bfloat16 matrix hardware on a CPU.
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16-master" if fast else "float32"
    return "bf16-master" if device.type == "cuda" else "float32"


def weights_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the model's weights. On a GPU memory is dear: there the optimizer alone keeps float32."""
    bfloat16 = precision == "bf16" or (precision == "bf16-master" and device.type == "cuda")
    return torch.bfloat16 if bfloat16 else torch.float32


def fix_order() -> None:
    """Let CUDA kernels add up in a fixed order, so that a run can be repeated bit for bit; a CPU always does."""
    # Sampling scans whole rows, each in one block and so in a fixed order, but torch has no word for that.
    warnings.filterwarnings("ignore", message="cumsum_cuda_kernel does not have a deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)


def load(
    name: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    on_host: bool = False,
) -> Policy:
    """Load `builtin`, a local folder in Hugging Face format, or a hub id, ready to sample and to train.

    `on_host` leaves it there, as it would be on the device.

    Raises CountdownError for a missing folder, weights that are missing, misshapen or not safetensors, a
    tokenizer that does not fit the model or has no chat template, and an architecture without full attention.
    """
    source, local = find(name)
    place = detect_device(device)
    # A CPU takes a hundred times as long for numbers below 1e-38, and sharp attention makes many.
    torch.set_flush_denormal(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for every shape of a batch
    chosen = detect_precision(precision, place)
    dtype = weights_dtype(chosen, place)
    config, tokenizer = _config(name), load_tokenizer(name)
    _check_vocabulary(name, config, tokenizer)
    free = free_memory(torch.device("cpu"))  # weights are read there, whatever the device
    if local:
        _check_size(name, Path(source), config, itemsize=dtype.itemsize, free=free)
    else:
        check_download(name, itemsize=dtype.itemsize, free=free)
    model = _load_model(name, source, config, local=local, dtype=dtype)
    if gradient_checkpointing:
        use_checkpointing(name, model)
    ends = end_ids(name, model, tokenizer)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id
    )
    path = fastest_path(model, fused=place.type == "cuda")
    return Policy(model if on_host else model.to(place), tokenizer, name, chosen, ends, path)


def fastest_path(model: transformers.PreTrainedModel, *, fused: bool = False) -> ComputePath:
    """The path that the model's config allows, and its attention set to it; the self-check may choose a slower one."""
    if attends_in_full(model.config.get_text_config()) and set_attention(model, plain=False):
        return PackedPath(fused=fused)
    set_attention(model, plain=True)
    return PlainPath(caches_right(model.config))


def use_checkpointing(name: str, model: transformers.PreTrainedModel) -> None:
    """Recompute each layer in the backward pass; raises CountdownError if the model cannot."""
    if not model.supports_gradient_checkpointing:
        raise CountdownError(f"`{name}` has no gradient checkpointing", "give `--gradient-checkpointing off`")
    checkpoint_layers(model)


def number_of_layers(name: str) -> int:
    """How many layers a model has, by its config alone."""
    return int(_config(name).get_text_config().num_hidden_layers)


def _config(name: str) -> transformers.PreTrainedConfig:
    """The model's config without what it says about attention kernels and files of weights: those are chosen here."""
    source, local = find(name)
    with _load_errors(name):
        settings, _ = transformers.PreTrainedConfig.get_config_dict(source, local_files_only=local)
        if settings.get("model_type") not in transformers.CONFIG_MAPPING:
            settings.pop("architectures", None)  # transformers says better that it does not know the type
    check_config(name, settings, CAUSAL)
    chosen = {"attn_implementation": "eager", "_attn_implementation": "eager", "transformers_weights": None}
    with _load_errors(name):
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=local, **chosen
        )
        config.get_text_config()  # raises where a model has several
    return cast("transformers.PreTrainedConfig", config)


def skeleton(name: str, *, dtype: torch.dtype, layers: int) -> transformers.PreTrainedModel:
    """The first layers of a model between its ends, on the meta device, which holds no weights: from its config alone.

    Raises CountdownError as `load` does.
    """
    config = _config(name)
    text = config.get_text_config()
    with _load_errors(name):
        if vars(text).get("layer_types"):  # of some architectures it follows from the number of layers
            text.layer_types = (text.layer_types * layers)[:layers]
        text.num_hidden_layers = layers
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
    set_attention(model, plain=not attends_in_full(text))
    return cast("transformers.PreTrainedModel", model.eval())


def find(name: str) -> tuple[str, bool]:
    """Where a model's files are: (folder or hub id, whether it is local)."""
    require_model(name)
    if name == "builtin":
        return str(BUILTIN), True
    path = Path(name)
    if is_gguf(name):
        return str(unpacked(path)), True
    if not path.is_dir():
        check_repository(name)
    return name, path.is_dir()


def _check_size(name: str, folder: Path, config: transformers.PreTrainedConfig, *, itemsize: int, free: int) -> None:
    """Refuse weights that do not fit into `free` bytes or the config.json, before anything of their size is made."""
    files = weight_files(name, folder)
    if not files:
        return  # said better where the weights are loaded
    check_memory(name, sum(path.stat().st_size for path in files), 1, free)
    with _load_errors(name):
        tensors = {key: stored for path in files for key, stored in _tensors(path).items()}
        held = sum(math.prod(shape) for shape, _ in tensors.values())
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        described = sum(math.prod(parameter.shape) for parameter in model.parameters())
    if not described <= 2 * held <= 4 * described:
        raise CountdownError(
            f"the config.json of `{name}` describes {described:,} weights, its files hold {held:,}",
            "save the model again",
        )
    for key, (_, dtype) in tensors.items():
        if dtype not in FLOATS and key.endswith("weight"):  # others are buffers, such as masks
            raise CountdownError(f"the weights of `{name}` are not floats of 16 bits or more: {key} ({dtype})", RESAVE)
    check_memory(name, described, itemsize, free)


def check_weights(folder: Path) -> None:
    """Raise CountdownError if weights in `folder` are cut off or, of a whole model, do not fit its config.json."""
    with _load_errors(str(folder)):
        for path in folder.glob("*.safetensors"):
            _tensors(path)
    if not (folder / ADAPTER).exists():
        _check_size(str(folder), folder, _config(str(folder)), itemsize=0, free=sys.maxsize)


def _tensors(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        return {key: (tensor.get_shape(), tensor.get_dtype()) for key, tensor in slices.items()}


def _load_model(
    name: str, source: str, config: transformers.PreTrainedConfig, *, local: bool, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    with _load_errors(name):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="eager",  # every model has it; `set_attention` chooses another
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with their names
        )
    model, report = cast("tuple[transformers.PreTrainedModel, dict[str, list[Any]]]", loaded)
    for kind, problems in report.items():
        if problems:
            first, *others = sorted(key if isinstance(key, str) else key[0] for key in problems)
            problem = f"{kind.replace('_', ' ')}: {first}" + (f" and {len(others)} more" if others else "")
            raise CountdownError(
                f"the weights of `{name}` do not fit its config.json ({problem})", "save the model again"
            )
    _check_values(name, model)
    model.eval()
    return model


def _check_values(name: str, model: transformers.PreTrainedModel) -> None:
    """Refuse weights that are not finite, embeddings of zeros, and models most of whose matrices are zeros."""
    matrices, zeros = 0, []
    embeddings = [part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part]
    for key, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CountdownError(f"the weights of `{name}` are not finite: {key}", RESAVE)
        matrices += weight.dim() > 1
        if weight.dim() > 1 and not bool(weight.any()):
            zeros.append((key, any(weight is one for one in embeddings)))
    if any(embeds for _, embeds in zeros) or 2 * len(zeros) > matrices:
        raise CountdownError(f"the weights of `{name}` are zeros: {zeros[0][0]}", RESAVE)


def attends_in_full(config: transformers.PreTrainedConfig) -> bool:
    """Whether all layers attend as `shared_prefix_attention` does: without windows and capped scores."""
    layers = getattr(config, "layer_types", None) or []
    limits = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")
    return all(kind == "full_attention" for kind in layers) and not any(getattr(config, key, None) for key in limits)


def caches_right(config: transformers.PreTrainedConfig) -> bool:
    """Whether the model's cache computes what its forward without one does."""
    return bool(config.get_text_config().model_type != "nemotron_h")  # off by 4e-3 after prompts beyond its chunks


def require_context(name: str, config: transformers.PreTrainedConfig, tokens: int) -> None:
    """Raise CountdownError for sequences of `tokens` beyond the positions, or where a row's length changes them all."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    keys = ["keep_window_size", "index_topk"]  # Doge and sparse attention by an indexer, not causal beyond
    keys += ["sliding_window"] if text.model_type == "moshi" else []  # its cache is wrong beyond
    limits = [getattr(text, key, None) for key in keys]
    context: int = getattr(text, "max_position_embeddings", None) or 0
    if rope is None:
        limits.append(context)
    else:
        nested = [rope, *(part for part in rope.values() if isinstance(part, dict))]
        scaled = [part for part in nested if part.get("rope_type") in ("dynamic", "longrope")]
        limits += [part.get("original_max_position_embeddings") or context for part in scaled]
    limit = min((limit for limit in limits if limit), default=tokens)
    if tokens > limit:
        reason = "it has no positions beyond it" if rope is None else "only rows of one length agree beyond it"
        raise CountdownError(
            f"prompt and completion take up to {tokens:,} tokens, and the context of `{name}` is {limit:,}: {reason}",
            "use a smaller `--max-new-tokens`",
        )


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model, alone; CountdownError if it has no chat template."""
    source, local = find(name)
    with _load_errors(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    if not tokenizer.chat_template:
        raise CountdownError(f"the tokenizer of `{name}` has no chat template", "use an instruction-tuned model")
    check_template(name, tokenizer, PROBE)
    with _load_errors(name):
        probe = encode(tokenizer, PROBE)
    if PROBE[-1]["content"] not in tokenizer.decode(probe):
        raise CountdownError(f"the tokenizer of `{name}` has no vocabulary", "save it beside the model again")
    return cast("transformers.PreTrainedTokenizerBase", tokenizer)


def prompt_tokens(name: str, messages: Sequence[dict[str, str]]) -> list[tuple[int, str]]:
    """A prompt as the model `name` reads it: (id, text) of each token. Loads the tokenizer alone."""
    tokenizer = load_tokenizer(name)
    return [(token, str(tokenizer.decode([token]))) for token in encode(tokenizer, messages)]


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise for files that they cannot read, which has no common base, into one sentence."""
    try:
        yield
    except Exception as error:
        sentence = str(error).replace(":\n", ": ").strip().partition("\n")[0]
        reason = " ".join(sentence.split()) or type(error).__name__
        hint = "check the folder's files" if os.path.isdir(name) else "check the name and the network"
        raise CountdownError(f"cannot load `{name}`: {reason}", hint) from error


def _check_vocabulary(
    name: str, config: transformers.PreTrainedConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and size > rows:
        raise CountdownError(
            f"the tokenizer of `{name}` has {size} tokens, its model only {rows}",
            "use the tokenizer that the model was trained with",
        )


def end_ids(
    name: str, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every end-of-sequence id: of the generation settings, the config, the tokenizer, and usual ends of a turn."""
    ends = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) in ENDS}
    configs = (model.generation_config, model.config, model.config.get_text_config())
    for ids in (*(getattr(config, "eos_token_id", None) for config in configs), tokenizer.eos_token_id):
        ends |= {end for end in (ids if isinstance(ids, list) else [ids]) if isinstance(end, int)}
    if not ends:
        raise CountdownError(f"`{name}` has no end-of-sequence token", "set `eos_token` in its tokenizer_config.json")
    return tuple(sorted(ends))
