"""Write a Hugging Face model folder as a GGUF file for llama.cpp, Ollama and `--model FILE.gguf`.

For Qwen2 and Llama architectures with byte-level BPE tokenizers; others are refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.gguf import CONTROL, PRETOKENIZERS, USER_DEFINED, reading, unpack
from grpo_cli.core.model.load import attends_in_full, end_ids
from grpo_cli.core.model.templates import PROBE, encode

NORMAL, UNUSED = 1, 5  # token types of the format
ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
PROBED, LARGEST = 48, 1e-3  # tokens of the probe; difference of a log-probability
CONVERTER = "export without `--gguf`, and run llama.cpp's convert_hf_to_gguf.py on the folder"
SPLIT_PROBE = "Make 25 of 3, 1234 and 2:  it's 3*(4+1)\n\n= 15 HELLO\tÄö"

Type = Literal["q8_0", "f16", "f32"]


def write(folder: Path, path: Path, *, kind: Type) -> None:
    """Write the model and tokenizer of `folder` to `path`; matrices in `kind`, vectors always in float32.

    Rows that 8-bit blocks do not fill are written in f16.
    Reads the file back. Raises CountdownError for an architecture, rotary scaling or tokenizer that cannot be written,
    and for a file that predicts otherwise than the folder.
    """
    from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, get_tensor_name_map, quants

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    config, architecture = model.config, ARCHITECTURES.get(type(model).__name__)
    if architecture is None or config.rope_parameters["rope_type"] != "default" or not attends_in_full(config):
        raise CountdownError(
            f"no GGUF writer for {type(model).__name__} with these rotary positions or windows", CONVERTER
        )
    head = model.get_decoder().layers[0].self_attn.head_dim
    writer = GGUFWriter(path, architecture)
    writer.add_name(path.stem)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = cast("Any", transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
    _add_tokenizer(writer, tokenizer, end_ids(folder.name, model, tokenizer), rows=config.vocab_size)
    names = get_tensor_name_map(getattr(MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            query = ".q_proj." in name
            weight = _interleaved(weight, config.num_attention_heads if query else config.num_key_value_heads)
        stored = _stored_as(weight, kind)
        written = quants.quantize(weight.numpy(), stored)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), written, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _require_equal(model, tokenizer, path, kind=kind)


@torch.no_grad()
def _require_equal(model: transformers.PreTrainedModel, tokenizer: Any, path: Path, *, kind: Type) -> None:
    """Raise CountdownError unless the file reads back as the model, with matrices in `kind`, and its tokenizer."""
    from gguf import quants

    with reading(path), tempfile.TemporaryDirectory() as scratch:
        unpack(path, Path(scratch))
        back = transformers.AutoModelForCausalLM.from_pretrained(scratch, local_files_only=True, dtype=torch.float32)
        prompts = [encode(one, PROBE) for one in (tokenizer, transformers.AutoTokenizer.from_pretrained(scratch))]
    for weight in model.parameters():
        stored = _stored_as(weight, kind)
        weight.copy_(torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), stored), stored)))
    row = torch.linspace(0, model.config.vocab_size - 1, PROBED).long()[None]  # (1, T)
    first, second = (one.eval()(input_ids=row).logits.log_softmax(dim=-1) for one in (model, back))
    difference = float((first - second).abs().max())
    if not difference <= LARGEST or prompts[0] != prompts[1]:
        path.unlink()
        what = f"log-probabilities by {difference:.2g}" if not difference <= LARGEST else "how it reads a prompt"
        raise CountdownError(f"the GGUF file would differ from {type(model).__name__} in {what}", CONVERTER)


def _stored_as(weight: Tensor, kind: Type) -> Any:
    """The type in which a weight of a file of this kind is stored."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    chosen = GGMLQuantizationType["F32" if weight.dim() == 1 else kind.upper()]
    return chosen if weight.shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0 else GGMLQuantizationType.F16


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder a Llama head's rows: llama.cpp rotates neighbouring rows, transformers rotates halves."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def _add_tokenizer(writer: Any, tokenizer: Any, ends: Sequence[int], *, rows: int) -> None:
    end = ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    added = tokenizer.added_tokens_decoder
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    unused = [f"[PAD{index}]" for index in range(len(tokens), rows)]
    kinds = [(CONTROL if added[i].special else USER_DEFINED) if i in added else NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(tokenizer))
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*kinds, *[UNUSED] * len(unused)])
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.get_chat_template())  # `default`, of several named ones
    writer.add_add_bos_token(False)


def _merges(tokenizer: Any) -> list[list[str]]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or tokenizer.backend_tokenizer.pre_tokenizer is None:
        raise CountdownError(f"no GGUF writer for tokenizers of kind {model['type']}", "export without `--gguf`")
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]


def _split_of(tokenizer: Any) -> str:
    """The `tokenizer.ggml.pre` of a tokenizer, found by how it splits a text."""
    _merges(tokenizer)
    own = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(SPLIT_PROBE)
    for name, build in PRETOKENIZERS.items():
        if pre_tokenizers.Sequence(build()).pre_tokenize_str(SPLIT_PROBE) == own:
            return name
    known = ", ".join(f"`{name}`" for name in PRETOKENIZERS)
    raise CountdownError(f"the tokenizer splits text like none of {known}", "export without `--gguf`")
