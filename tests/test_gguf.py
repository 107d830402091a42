"""GGUF files of tiny models, written with the format's own package, against the folders that they were made from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Command, configure, save_tiny_model

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model import gguf, gguf_write
from grpo_cli.core.model.load import load

format_package = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


LETTERS = [*"0123456789abcdefghijklmnopqrstuvwxyz =*+<>/|_", "Ġ", "Ċ", "25", "Ġ25"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "countdown"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_write.write(tiny_folder, path, kind="f32")
    return path


def facts(split: str) -> dict[str, object]:
    """What a GGUF file says of a tokenizer that splits digits as `split` does."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": [*LETTERS, "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * len(LETTERS) + [gguf.CONTROL],
        "tokenizer.ggml.merges": ["2 5", "Ġ 25"],
        "tokenizer.ggml.eos_token_id": len(LETTERS),
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }


def save_tiny_llama(folder: Path, **changes: object) -> Path:
    """A Llama model whose heads are grouped and whose tokenizer splits digits, as SmolLM2's does."""
    gguf.build_tokenizer(facts("smollm")).save_pretrained(folder)
    settings: dict[str, object] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.25, "eos_token_id": len(LETTERS),
    }  # fmt: skip
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_written_file_reads_back_as_the_same_model(
    architecture: str, kind: gguf_write.Type, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tiny_folder if architecture == "qwen2" else save_tiny_llama(tmp_path / "llama")
    gguf_write.write(folder, tmp_path / "tiny.gguf", kind=kind)
    back = gguf.unpacked(tmp_path / "tiny.gguf")
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, back))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if kind == "q8_0" and weight.dim() > 1 and weight.shape[1] % 32 == 0:  # blocks of 32, in steps of max / 127
            steps = weight.reshape(-1, 32).abs().amax(dim=1, keepdim=True) / 127
            assert bool(((after[name] - weight).reshape(-1, 32).abs() <= 0.6 * steps).all()), name
            continue
        expected = weight.half().float() if kind != "f32" and weight.dim() > 1 else weight
        assert torch.equal(after[name], expected), name
    first, second = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, back))
    assert first("25 = 3*4\n it's")["input_ids"] == second("25 = 3*4\n it's")["input_ids"]
    assert first.chat_template == second.chat_template
    assert first.eos_token_id in transformers.GenerationConfig.from_pretrained(back).eos_token_id


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.01}),
        ("qwen2", {"head_dim": 16}),
    ],
)
def test_a_file_holds_biases_and_widths_of_heads(architecture: str, changes: dict[str, object], tmp_path: Path) -> None:
    save: Callable[..., Path] = save_tiny_llama if architecture == "llama" else save_tiny_model
    gguf_write.write(save(tmp_path / "model", **changes), tmp_path / "x.gguf", kind="f32")
    back = gguf.unpacked(tmp_path / "x.gguf")
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.arange(20)[None]).logits
        for folder in (tmp_path / "model", back)
    )
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "changes", "sentence"),
    [
        ("llama", {"hidden_act": "gelu"}, "would differ from LlamaForCausalLM in log-probabilities"),
        ("qwen2", {"hidden_act": "relu"}, "would differ from Qwen2ForCausalLM in log-probabilities"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "windows"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}, "windows"),
    ],
)
def test_a_file_that_would_be_another_model_is_refused(
    architecture: str, changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    save: Callable[..., Path] = save_tiny_llama if architecture == "llama" else save_tiny_model
    with pytest.raises(CountdownError, match=sentence):
        gguf_write.write(save(tmp_path / "model", **changes), tmp_path / "x.gguf", kind="f16")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"blk.0.attn_q.bias": "rope_freqs.weight"}, "Qwen2ForCausalLM does not use `rope_freqs.weight`"),
        ({"blk.1.attn_k.weight": "blk.1.attn_sinks.weight"}, "Qwen2ForCausalLM does not use `blk.1.attn_sinks.weight`"),
        ({"output_norm.weight": "output.weight"}, "."),
    ],
)
def test_a_file_with_tensors_that_its_model_does_not_use_is_refused(
    names: dict[str, str], sentence: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_write, "_require_equal", lambda *_, **__: None)
    add = format_package.GGUFWriter.add_tensor
    renamed = lambda self, name, *rest, **kind: add(self, names.get(name, name), *rest, **kind)  # noqa: E731
    monkeypatch.setattr(format_package.GGUFWriter, "add_tensor", renamed)
    gguf_write.write(tiny_folder, tmp_path / "x.gguf", kind="f32")
    with pytest.raises(CountdownError, match=sentence):
        gguf.unpacked(tmp_path / "x.gguf")


def test_an_end_only_in_the_config_and_named_templates_are_written(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    end = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    configure(folder, "tokenizer_config.json", **{**settings, "eos_token": None})
    template = (folder / "chat_template.jinja").read_text()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert isinstance(transformers.AutoTokenizer.from_pretrained(folder).chat_template, dict)
    gguf_write.write(folder, tmp_path / "x.gguf", kind="f32")
    back = transformers.AutoTokenizer.from_pretrained(gguf.unpacked(tmp_path / "x.gguf"))
    assert (back.eos_token_id, back.chat_template) == (end, template)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CountdownError, match="no GGUF writer for GPT2LMHeadModel"):
        gguf_write.write(tmp_path, tmp_path / "x.gguf", kind="f32")


def test_a_file_is_unpacked_once(file: Path, cache: Path) -> None:
    first = gguf.unpacked(file)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert gguf.unpacked(file) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_two_processes_may_unpack_a_file_at_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = gguf.unpack

    def overtaken(path: Path, folder: Path) -> None:
        monkeypatch.setattr(gguf, "unpack", unpack)
        gguf.unpacked(path)
        unpack(path, folder)

    monkeypatch.setattr(gguf, "unpack", overtaken)
    folder = gguf.unpacked(file)
    assert (folder / "model.safetensors").is_file()
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("smollm", ["2", "5", "=", "Ġ", "2", "5"]),
        ("gpt-2", ["25", "=", "Ġ25"]),
        ("llama-bpe", ["25", "=", "Ġ", "25"]),
    ],
)
def test_text_is_split_as_the_file_says(split: str, pieces: list[str], tmp_path: Path) -> None:
    tokenizer = gguf.build_tokenizer(facts(split))
    tokenizer.save_pretrained(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("25= 25") == pieces
    assert again.tokenize("25= 25") == pieces
    assert again("2<|im_end|>")["input_ids"] == [2, len(LETTERS)]


def test_unknown_splitting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CountdownError, match="`other`"):
        gguf.build_tokenizer(facts("other"))


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


def test_what_is_no_file_is_refused_before_any_model_loads(countdown: Command, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    for name, sentence in (("none.gguf", "no file `none.gguf`"), ("folder.gguf", "`folder.gguf` is a folder")):
        for command in (["eval", "unloadable/model", name], ["train", "--ref-model", name, "--dry-run"]):
            result = countdown(*command)
            assert (result.code, sentence in result.err) == (2, True), result.err


def test_commands_take_a_file(file: Path, countdown: Command) -> None:
    assert countdown("eval", file, "--limit", 2, "--max-new-tokens", 4, "--json").code == 0
    assert countdown("solve", "4 7 3 = 25", "--model", file, "--max-new-tokens", 4).code in (0, 1)
    assert countdown("train", "--model", file, "--dry-run").code == 0


def test_a_run_keeps_what_the_converter_of_llama_cpp_reads(file: Path, tmp_path: Path, countdown: Command) -> None:
    arguments = [
        "--batch-size", 1, "--num-generations", 2, "--max-new-tokens", 4, "--num-iterations", 1, "--eval-puzzles", 1,
    ]  # fmt: skip
    assert countdown("train", "--model", file, "--run", "one", *arguments).code == 0
    folder = tmp_path / "runs" / "one" / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert transformers.AutoConfig.from_pretrained(folder).architectures == ["Qwen2ForCausalLM"]
    assert load(str(folder), device="cpu").tokenizer.chat_template
    vocabulary = format_package.SpecialVocab(folder, load_merges=True)
    assert vocabulary.merges and vocabulary.chat_template and "eos" in vocabulary.special_token_ids
