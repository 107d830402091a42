"""GGUF files, the format of llama.cpp and Ollama: unpacked once to a Hugging Face folder for all commands.

transformers dequantises the weights. The tokenizer is built here, because transformers' converter ignores the
pre-tokenizer in `tokenizer.ggml.pre`: SmolLM2 would read `25` as one token but was trained on two.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub.constants import HF_HOME
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import modeling_gguf_pytorch_utils
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.names import require_gguf

modeling_gguf_pytorch_utils.tqdm = partial(modeling_gguf_pytorch_utils.tqdm, disable=True)

ENDS = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>", "<|end|>"}
CONTROL, USER_DEFINED = 3, 4  # token types of the format
LLAMA3 = (  # of Llama 3's tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _bytes(*before: Any) -> list[Any]:
    return [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


PRETOKENIZERS: dict[str, Callable[[], list[Any]]] = {
    "qwen2": lambda: _split(PRETOKENIZE_REGEX),
    "smollm": lambda: _bytes(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: _split(LLAMA3),
    "gpt-2": _bytes,
}
"""`tokenizer.ggml.pre` -> how text is split before merging, as llama.cpp does it."""


def unpacked(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file, made on first use and cached with Hugging Face's libraries.

    Raises CountdownError for a file that is missing, damaged, or of an unsupported model.
    """
    require_gguf(path)
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "countdown" / f"{path.stem}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpacking-"))
        try:
            with reading(path):
                unpack(path, made)
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has unpacked the file meanwhile
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def unpack(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder`: config.json, float32 safetensors, tokenizer, generation settings."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name for tensor in reader.tensors}
    tokenizer = build_tokenizer(facts)
    local: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(path.parent, **local)
    for name, value in _settings(facts, tensors).items():
        setattr(config, name, value)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, config=config, dtype="float32", output_loading_info=True, **local
    )
    model = cast("transformers.PreTrainedModel", loaded)
    _require_used(model, str(facts["general.architecture"]), tensors, report["missing_keys"])
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised; transformers would refuse to save them
    ends = _end_ids(facts)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, ends, tokenizer.pad_token_id
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _settings(facts: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    """Settings of a Llama or Qwen2 config that transformers does not take from the file."""
    architecture = facts["general.architecture"]
    settings: dict[str, Any] = {}
    if architecture in ("llama", "qwen2") and f"{architecture}.attention.key_length" in facts:
        settings["head_dim"] = int(facts[f"{architecture}.attention.key_length"])
    if architecture == "llama":
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
        settings |= {setting: True for setting, name in biases.items() if name in tensors}
    return settings


def _require_used(
    model: transformers.PreTrainedModel, architecture: str, tensors: set[str], missing: Collection[str]
) -> None:
    """Refuse a file with tensors that the model does not use, or without some that it needs."""
    loader = modeling_gguf_pytorch_utils
    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(config=model.config.to_dict())
    used = loader.get_gguf_hf_weights_map(model, processor)
    unused = sorted(name for name in tensors - used.keys() if "_exps" not in name)  # experts are joined or split
    for kind, names in (("does not use", unused), ("needs and the file lacks", sorted(missing))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CountdownError(
                f"{type(model).__name__} {kind} `{names[0]}`{more}", "use the model's Hugging Face folder"
            )


def build_tokenizer(facts: Mapping[str, Any]) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer described by the keys of a GGUF file."""
    tokens = cast("list[str]", facts["tokenizer.ggml.tokens"])
    kinds = cast("list[int]", facts["tokenizer.ggml.token_type"])
    kind, split = facts["tokenizer.ggml.model"], str(facts.get("tokenizer.ggml.pre", "unnamed"))
    if kind != "gpt2" or split not in PRETOKENIZERS:
        known = ", ".join(f"`{name}`" for name in PRETOKENIZERS)
        raise CountdownError(
            f"the tokenizer of this file is of kind `{kind}`, `{split}`; kinds of `gpt2` that can be read are {known}",
            "use the model's Hugging Face folder",
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in facts["tokenizer.ggml.merges"])]
    end = tokens[int(facts["tokenizer.ggml.eos_token_id"])]
    pad = tokens[int(facts.get("tokenizer.ggml.padding_token_id", facts["tokenizer.ggml.eos_token_id"]))]
    tokenizer: transformers.PreTrainedTokenizerBase
    if split == "qwen2":  # AutoTokenizer rebuilds this class from vocabulary and merges
        tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token=end, pad_token=pad)
    else:
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(PRETOKENIZERS[split]())
        bpe.decoder = decoders.ByteLevel()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=pad)
    for special, number in ((True, CONTROL), (False, USER_DEFINED)):
        added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == number]
        tokenizer.add_tokens(
            [AddedToken(token, special=special, normalized=False) for token in added], special_tokens=special
        )
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _end_ids(facts: Mapping[str, Any]) -> list[int]:
    """End-of-sequence ids: the file's own, and the family's usual ones if they are in the vocabulary."""
    named = {int(facts[key]) for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in facts}
    kinds = zip(facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"], strict=True)
    return sorted(named | {index for index, (text, kind) in enumerate(kinds) if text in ENDS and kind == CONTROL})


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the readers' errors for a damaged file, which have no common base, into one sentence."""
    try:
        yield
    except CountdownError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CountdownError(
            f"cannot read `{path}`: {reason[:200]}", "download the file again, or use the model's Hugging Face folder"
        ) from error
