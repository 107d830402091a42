"""Model folders, hub models and chat templates that cannot be used: one sentence before any weights are read."""

import json
import os
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import safetensors
import transformers
from conftest import Command, configure

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model import hub
from grpo_cli.core.model import load as loading
from grpo_cli.core.model.load import load, load_tokenizer, skeleton

pytestmark = pytest.mark.faults


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of weights may be read."""
    for module, name in ((transformers.AutoModelForCausalLM, "from_pretrained"), (safetensors, "safe_open")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("read weights"))


def index(*names: object) -> Callable[[Path], None]:
    """Replace the weights by an index that names these files."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        places = {f"weight{i}": name for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return write


def replace(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return write


def an_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def quantised(method: str) -> Callable[[Path], None]:
    return lambda folder: configure(folder, quantization_config={"quant_method": method, "bits": 4})


def an_architecture(kind: str, **settings: object) -> Callable[[Path], None]:
    return lambda folder: configure(folder, architectures=[kind], **settings)


def a_template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def a_nested_index(folder: Path) -> None:
    index()(folder)
    (folder / "model.safetensors.index.json").write_text("[" * 10**5)


def a_linked_shard(folder: Path) -> None:
    index("a.safetensors")(folder)
    (folder / "a.safetensors").symlink_to("../elsewhere.safetensors")


def a_hundred_words(folder: Path) -> None:
    configure(folder, vocab_size=100)


BOTH = "{{ messages[0].content }} {{ messages[1].content }}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role!') }}{% endif %}"
EACH = "{% for message in messages %}{{ message.content }}{% endfor %}"

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an index names a pickle": (index("pytorch_model.bin"), "names 'pytorch_model.bin': only safetensors"),
    "an index leads up": (index("../elsewhere.safetensors"), "names '../elsewhere.safetensors': only safetensors"),
    "an absolute index": (index("/tmp/elsewhere.safetensors"), "names '/tmp/elsewhere.safetensors': only safetensors"),
    "an index of numbers": (index(3), "names '3': only safetensors"),
    "an index of nothing": (index(), "names no file of weights"),
    "an index nested deeply": (a_nested_index, "is not an index of weights"),
    "a missing shard": (index("model-1.safetensors"), "names `model-1.safetensors`, which is missing"),
    "a FIFO for weights": (replace("model.safetensors", os.mkfifo), "model.safetensors` is not a file inside"),
    "a FIFO for a tokenizer": (replace("tokenizer.json", os.mkfifo), "tokenizer.json` is not a file inside"),
    "a link to a device": (
        replace("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "model.safetensors` is not a file inside its model folder",
    ),
    "a link that leaves": (a_linked_shard, "a.safetensors` is not a file inside its model folder"),
    "a link to itself": (
        replace("model.safetensors", lambda path: path.symlink_to("model.safetensors")),
        "model.safetensors` is not a file inside its model folder",
    ),
    "a folder of templates elsewhere": (
        lambda folder: (folder / "additional_chat_templates").symlink_to(folder.parent),
        "additional_chat_templates` is not a file inside its model folder",
    ),
    "an adapter": (an_adapter, "is an adapter without its base model"),
    "GPTQ": (quantised("gptq"), "are quantised (gptq)"),
    "AWQ": (quantised("awq"), "are quantised (awq)"),
    "bitsandbytes": (quantised("bitsandbytes"), "are quantised (bitsandbytes)"),
    "an encoder": (an_architecture("BertForMaskedLM", model_type="bert"), "but a `BertForMaskedLM`"),
    "an embedding model": (an_architecture("Qwen2Model"), "is not a causal language model but a `Qwen2Model`"),
    "an encoder-decoder": (an_architecture("T5ForConditionalGeneration", model_type="t5"), "but a `T5For"),
    "a small vocabulary": (a_hundred_words, "tokens, its model only 100"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    "a megabyte": (a_template(BOTH + "{{ 'x' * 10**6 }}"), "makes 1,000,0"),
    "no system message": (a_template(NO_SYSTEM + EACH), "fails: No system role!"),
    "no turns": (a_template("{{ 1 / 0 }}"), "fails: division by zero"),
    "an attribute outside the sandbox": (a_template("{{ messages.__class__.__mro__[1] }}"), "fails: access to"),
    "an unknown function": (a_template("{{ nothing.here() }}"), "fails: 'nothing' is undefined"),
    "messages ignored": (a_template("Hello."), "leaves out the system message"),
    "the user ignored": (a_template("{{ messages[0].content }}"), "leaves out the user message"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_sentence_before_weights_are_read(case: str, folder: Path, no_weights: None) -> None:
    spoil, reason = REFUSED[case]
    spoil(folder)
    start = time.monotonic()
    with pytest.raises(CountdownError) as refused:
        load(str(folder), device="cpu", precision="float32")
    assert reason in refused.value.message and "\n" not in refused.value.message
    assert refused.value.exit_code == 2 and refused.value.hint and "network" not in refused.value.hint
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("case", ["a FIFO for weights", "GPTQ", "an encoder", "no system message", "an adapter"])
def test_a_planned_training_is_refused_alike(case: str, folder: Path, countdown: Command) -> None:
    REFUSED[case][0](folder)
    result = countdown("train", "--dry-run", "--model", folder)
    assert result.code == 2 and "Traceback" not in result.err
    assert "error: " in result.err and "hint: " in result.err


def test_shards_and_links_within_the_folder_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123"
    model.save_pretrained(cached, max_shard_size="50KB")
    load_tokenizer(str(tiny_folder)).save_pretrained(cached)
    (tmp_path / "models--owner--name" / "blobs").mkdir()
    for path in list(cached.iterdir()):  # as Hugging Face's cache does it
        path.rename(cached.parents[1] / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert len(list(cached.glob("*.safetensors"))) > 2
    assert load(str(cached), device="cpu", precision="float32").model.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("value", ["eager", "flash_attention_2", "someone/kernels", "nonsense", 5])
def test_attention_kernels_in_a_config_change_nothing(value: object, folder: Path, tiny_folder: Path) -> None:
    expected = load(str(tiny_folder), device="cpu", precision="float32").model.config._attn_implementation
    configure(folder, _attn_implementation=value, attn_implementation=value)
    policy = load(str(folder), device="cpu", precision="float32")
    assert policy.model.config._attn_implementation == expected
    assert skeleton(str(folder), dtype=policy.model.dtype, layers=1).config._attn_implementation == expected


def test_weights_larger_than_the_free_memory_are_refused(
    folder: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: 50_000)
    with pytest.raises(CountdownError, match="GB of memory"):
        load(str(folder), device="cpu", precision="float32")


class Hub(ThreadingHTTPServer):
    """A server that answers as the hub does for one model, `owner/name`."""

    info: dict[str, object]  # what it says about the model
    contents: dict[str, bytes]  # of its files
    asked: list[str]  # paths of requests


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        about = self.path.partition("?")[0] == "/api/models/owner/name"
        name = self.path.rpartition("/")[2]
        body = json.dumps(self.server.info).encode() if about else self.server.contents.get(name)
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, server: Hub
) -> Iterator[Callable[..., Hub]]:
    """Make the server offer a model: the tiny one's config and tokenizer, other names and sizes of files."""
    small = {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.suffix != ".safetensors"}
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with the address of that time

    def offer(files: dict[str, int], weights: int | None = None, **contents: bytes) -> Hub:
        siblings = [{"rfilename": name, "size": size} for name, size in files.items()]
        total = {} if weights is None else {"safetensors": {"parameters": {"BF16": weights}, "total": weights}}
        server.info = {"id": "owner/name", "sha": "0" * 40, "siblings": siblings, **total}
        server.contents = {name: text for name, text in {**small, **contents}.items() if name in files}
        server.asked = []
        return server

    hub._info.cache_clear()
    yield offer
    hub._info.cache_clear()


SMALL_FILES = dict.fromkeys(
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"], 1
)


@pytest.mark.parametrize(
    ("files", "weights", "contents", "reason"),
    [
        ({"model.safetensors": 10**15}, None, {}, "take 1,000,000.0 GB of memory"),
        ({"model.safetensors": 10**3}, 10**14, {}, "take 400,000.0 GB of memory"),
        ({"model.safetensors.index.json": 9, "a.safetensors": 10**15}, None, {"a.safetensors"}, "1,000,000.0 GB"),
        ({"model.safetensors.index.json": 9}, None, {"pytorch_model.bin"}, "names 'pytorch_model.bin'"),
        ({"pytorch_model.bin": 10**9}, None, {}, "has no weights as safetensors"),
    ],
)
def test_a_hub_model_is_judged_before_its_weights_are_downloaded(
    files: dict[str, int], weights: int | None, contents: set[str], reason: str, serve: Callable[..., Hub]
) -> None:
    places = json.dumps({"weight_map": dict.fromkeys(contents, next(iter(contents), ""))}).encode()
    started = serve({**SMALL_FILES, **files}, weights, **{"model.safetensors.index.json": places})
    with pytest.raises(CountdownError) as refused:
        load("owner/name", device="cpu", precision="float32")
    assert reason in refused.value.message and refused.value.hint
    assert not [path for path in started.asked if path.endswith((".safetensors", ".bin"))]


def test_an_adapter_on_the_hub_is_refused_before_anything_is_downloaded(serve: Callable[..., Hub]) -> None:
    started = serve({"adapter_config.json": 100, "adapter_model.safetensors": 10**6})
    with pytest.raises(CountdownError, match="is an adapter without its base model"):
        load("owner/name", device="cpu", precision="float32")
    assert [path.partition("?")[0] for path in started.asked] == ["/api/models/owner/name"]


def test_a_hub_out_of_reach_leaves_models_of_the_local_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub._info.cache_clear()
    with pytest.raises(CountdownError, match="is not on this machine, and the hub is out of reach") as refused:
        hub.check_repository("owner/name")
    assert refused.value.hint and "name its folder or GGUF file" in refused.value.hint
    cached = tmp_path / "models--owner--name"
    for path, text in {"refs/main": "0" * 40, f"snapshots/{'0' * 40}/config.json": "{}"}.items():
        (cached / path).parent.mkdir(parents=True)
        (cached / path).write_text(text)
    hub.check_repository("owner/name")
    hub.check_download("owner/name", itemsize=4, free=0)
    hub._info.cache_clear()
