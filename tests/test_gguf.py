"""GGUF files of tiny models, written with the format's own package, against the folders that they were made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Command

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model import gguf
from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Sequences
from grpo_cli.core.task.prompts import STYLES, prompt
from grpo_cli.core.task.puzzle import Puzzle

format_package = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "countdown"


def write_gguf(path: Path, folder: Path) -> Path:
    """The Qwen2 model of `folder` as a GGUF file of float32 tensors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = format_package.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, tokenizer, split="qwen2", rows=config.vocab_size)
    names = format_package.get_tensor_name_map(format_package.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any, tokenizer: transformers.PreTrainedTokenizerBase, *, split: str, rows: int) -> None:
    added = tokenizer.added_tokens_decoder
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = [(gguf.CONTROL if added[i].special else gguf.USER_DEFINED) if i in added else 1 for i in range(len(tokens))]
    unused = [f"[PAD{index}]" for index in range(len(tokens), rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*kinds, *[5] * len(unused)])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer._merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_folder)


def test_a_file_is_the_model_that_it_was_made_from(file: Path, tiny_folder: Path) -> None:
    ours, theirs = (load(str(path), device="cpu", precision="float32") for path in (file, tiny_folder))
    for style in STYLES:
        assert ours.encode(prompt(Puzzle((3, 10, 2), 75), style)) == theirs.encode(
            prompt(Puzzle((3, 10, 2), 75), style)
        )
    sequences = Sequences([[5, 17, 300]], [[400, 9, 33]], [0])
    expected, _ = theirs.logprobs(sequences, temperature=1.0)
    assert torch.allclose(ours.logprobs(sequences, temperature=1.0)[0], expected, atol=1e-5)
    assert set(theirs.end_ids) <= set(ours.end_ids)


def test_a_file_is_unpacked_once(file: Path, cache: Path) -> None:
    first = gguf.unpacked(file)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert gguf.unpacked(file) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in cache.iterdir()] == [first.name]


LETTERS = [*"0123456789abcdefghijklmnopqrstuvwxyz =*+<>/|_", "Ġ", "Ċ", "25", "Ġ25"]


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("smollm", ["2", "5", "=", "Ġ", "2", "5"]),
        ("gpt-2", ["25", "=", "Ġ25"]),
        ("llama-bpe", ["25", "=", "Ġ", "25"]),
    ],
)
def test_text_is_split_as_the_file_says(split: str, pieces: list[str], tmp_path: Path) -> None:
    facts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": [*LETTERS, "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * len(LETTERS) + [gguf.CONTROL],
        "tokenizer.ggml.merges": ["2 5", "Ġ 25"],
        "tokenizer.ggml.eos_token_id": len(LETTERS),
        "tokenizer.chat_template": "{{ messages[-1]['content'] }}",
    }
    tokenizer = gguf.build_tokenizer(facts)
    tokenizer.save_pretrained(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("25= 25") == pieces
    assert again.tokenize("25= 25") == pieces
    assert again("2<|im_end|>")["input_ids"] == [2, len(LETTERS)]


def test_unknown_splitting_is_refused(tmp_path: Path) -> None:
    facts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "other"}
    with pytest.raises(CountdownError, match="`other`"):
        gguf.build_tokenizer({**facts, "tokenizer.ggml.tokens": [], "tokenizer.ggml.token_type": []})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda whole: whole[:-2000], "cannot read"),
        (lambda whole: whole[:100], "cannot read"),
        (lambda whole: b"GGML" + whole[4:], "is not a GGUF file"),
        (lambda whole: b"", "is not a GGUF file"),
    ],
)
def test_a_damaged_file_is_refused(
    damage: Callable[[bytes], bytes], sentence: str, file: Path, tmp_path: Path, cache: Path, countdown: Command
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(file.read_bytes()))
    result = countdown("eval", broken, "--limit", 1)
    assert result.code == 2
    assert sentence in result.err
    assert "Traceback" not in result.err
    assert not cache.exists() or not list(cache.iterdir())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CountdownError, match="no file"):
        gguf.unpacked(tmp_path / "none.gguf")


def test_commands_take_a_file(file: Path, countdown: Command) -> None:
    assert countdown("eval", file, "--limit", 2, "--max-new-tokens", 4, "--json").code == 0
    assert countdown("solve", "4 7 3 = 25", "--model", file, "--max-new-tokens", 4).code in (0, 1)
    assert countdown("train", "--model", file, "--dry-run").code == 0


def test_a_run_keeps_what_the_converter_of_llama_cpp_reads(file: Path, tmp_path: Path, countdown: Command) -> None:
    arguments = [
        "--batch-size",
        1,
        "--num-generations",
        2,
        "--max-new-tokens",
        4,
        "--num-iterations",
        1,
        "--eval-puzzles",
        1,
    ]
    assert countdown("train", "--model", file, "--run", "one", *arguments).code == 0
    folder = tmp_path / "runs" / "one" / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert transformers.AutoConfig.from_pretrained(folder).architectures == ["Qwen2ForCausalLM"]
    assert load(str(folder), device="cpu").tokenizer.chat_template
    vocabulary = format_package.SpecialVocab(folder, load_merges=True)
    assert vocabulary.merges and vocabulary.chat_template and "eos" in vocabulary.special_token_ids
