"""A causal language model with its tokenizer: load, log-probabilities, save. The only module that knows transformers.

What is loaded is checked (missing or misshapen weights are refused, pickles and remote code are never touched), and a
model's own generation settings are ignored: every model is sampled alike. Knows neither puzzles nor rewards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from grpo_cli.core import qwen2
from grpo_cli.core.attention import Packed, Plan, Prefill, shared_prefix_attention
from grpo_cli.core.attention import order as packing_order
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.ranks import Solo

ATTENTION = "countdown_shared_prefix"
BUILTIN = Path(__file__).parent / "builtin" / "model"

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "float32", "bf16-master", "bf16"]

PROBE = [{"role": "system", "content": "Solve it."}, {"role": "user", "content": "Make 13 of 3, 5 and 2."}]

transformers.AttentionInterface.register(ATTENTION, shared_prefix_attention)
transformers.utils.logging.set_verbosity_error()  # what loading reports is checked and raised here
transformers.utils.logging.set_tqdm_hook(lambda make, args, options: make(*args, **{**options, "disable": True}))


@dataclass(frozen=True)
class Sequences:
    """Prompts and completions, as token ids; completion r answers prompt `owners[r]`."""

    prompts: list[list[int]]
    completions: list[list[int]]
    owners: list[int]

    def mask(self) -> Tensor:
        """(B, T) boolean: which entries of a padded matrix of completion tokens are real. Built from lengths alone."""
        lengths = torch.tensor([len(completion) for completion in self.completions])
        return torch.arange(max(lengths.tolist(), default=0)) < lengths[:, None]

    def subset(self, rows: Sequence[int]) -> Sequences:
        """The completions `rows`, with the prompts that they answer and no others."""
        used = sorted({self.owners[row] for row in rows})
        number = {prompt: index for index, prompt in enumerate(used)}
        completions = [self.completions[row] for row in rows]
        return Sequences([self.prompts[p] for p in used], completions, [number[self.owners[row]] for row in rows])


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer on a device."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    precision: str
    end_ids: tuple[int, ...] = field(default=())
    ranks: Solo | None = None  # over which the weights are sharded, and which then pass through the model together
    samplers: list[object] = field(default_factory=list, repr=False, compare=False)  # what a rollout keeps for the next
    tile: int = 0  # tokens whose logits are computed at once, and again backward; 0 is all of them, once
    works_on: torch.device | None = None  # where the weights are brought for a pass, if that is not where they live

    @property
    def is_sharded(self) -> bool:
        return self.ranks is not None

    @property
    def device(self) -> torch.device:
        return cast("torch.device", self.model.device)

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Chat messages -> token ids up to where the assistant's answer begins, by the model's own chat template."""
        return encode(self.tokenizer, messages)

    def decode(self, tokens: Sequence[int]) -> str:
        """Completion ids -> text, without the end-of-sequence token."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of a forward pass: bfloat16 over float32 weights where the precision says so."""
        wanted = self.precision == "bf16-master" and not self.has_masters
        if self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    @property
    def has_masters(self) -> bool:
        """Whether the weights are in bfloat16 and the optimizer is to keep float32 masters of them."""
        return self.precision == "bf16-master" and self.model.dtype == torch.bfloat16

    def hidden(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Final hidden states (B, T, D) of `tokens` (B, T) at `positions` (B, T), attending as `plan` says."""
        decoder = self.model.get_decoder()
        output = decoder(input_ids=tokens, position_ids=positions, use_cache=False, plan=plan)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return self.model.get_output_embeddings()(hidden)  # type: ignore[no-any-return]

    def prefill(self, tokens: Tensor, lengths: Tensor, plan: Prefill) -> Tensor:
        """Logits (P, V) of what follows prompts (P, L) of which the first `lengths` (P,) tokens are real."""
        rows = torch.arange(len(tokens), device=self.device)
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        if self.ranks:
            kept, which = (lengths - 1).unique(return_inverse=True)
            return self._with_ranks(self.ranks, tokens, positions, plan, kept)[rows, which]
        return self.logits(self.hidden(tokens, positions, plan)[rows, lengths - 1])

    def _of_model(self, tokens: Tensor, positions: Tensor, plan: Plan, kept: Tensor | int) -> Tensor:
        """Logits (B, T', V) of the places `kept` (T',), all if it is 0, by the model as a whole.

        Within its forward pass alone are the layers of a sharded model whole.
        """
        output = self.model(input_ids=tokens, position_ids=positions, use_cache=False, plan=plan, logits_to_keep=kept)
        return cast(Tensor, output.logits)

    @property
    def can_step_in_place(self) -> bool:
        """Whether `step` can do without copies of the weights."""
        return qwen2.fits(self.model) and not self.is_sharded

    def step(self, longest: int, *, in_place: bool = False) -> Callable[[Tensor, Tensor, Plan], Tensor]:
        """What decodes one token a row: tokens (B,), positions (B,) below `longest` and a plan -> logits (B, V).

        With `in_place` it reads the weights where they lie whenever it is called, else those of now.
        """
        if ranks := self.ranks:
            return lambda tokens, positions, plan: self._with_ranks(
                ranks, tokens[:, None], positions[:, None], plan, 0
            )[:, 0]
        if qwen2.fits(self.model):
            # On a CPU a single token's activations cost more to convert than multiplying them in bfloat16 saves.
            converted = self.precision == "bf16-master" and self.device.type != "cpu" and not in_place
            dtype = torch.bfloat16 if converted else self.model.dtype
            written = qwen2.Pass(self.model, longest=longest, dtype=dtype, in_place=in_place)
            return lambda tokens, positions, plan: written.logits(written.hidden(tokens, positions, plan))
        return lambda tokens, positions, plan: self.logits(self.hidden(tokens[:, None], positions[:, None], plan)[:, 0])

    def _with_ranks(self, ranks: Solo, tokens: Tensor, positions: Tensor, plan: Plan, kept: Tensor | int) -> Tensor:
        """As `_of_model`, in a pass that the other ranks make too, within `in_step`."""
        ranks.going(mine=True)
        return self._of_model(tokens, positions, plan, kept)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """While this lasts the policy samples; of a sharded one all ranks do, until none has a pass to make."""
        try:
            yield
        finally:
            if self.ranks:
                nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                while self.ranks.going(mine=False):
                    self._of_model(nothing, nothing, Prefill(), 0)
                cast(Any, self.model).reshard()

    def _hidden_of_row(self, tokens: Tensor, plan: Packed) -> Tensor:
        """Final hidden states (N, D) of one packed row (N,). The written-out pass has no gradient checkpointing."""
        if self.device.type == "cpu" and qwen2.fits(self.model) and not self.model.is_activation_checkpointing:
            dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
            written = qwen2.Pass(self.model, longest=int(plan.positions.max()) + 1, dtype=dtype)
            return written.hidden(tokens, plan.positions[0], plan, packed=True)
        return self.hidden(tokens[None], plan.positions, plan)[0]

    def logprobs(self, sequences: Sequences, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, both (B, T) float32, of each completion token under the sampling distribution.

        That is the softmax of logits / temperature, taken in float32. Padding is 0. Entropy carries no gradient.
        """
        order = packing_order([len(row) for row in sequences.completions], sequences.owners, self.device)
        completions = [sequences.completions[row] for row in order]
        prompt_lengths, lengths = ([len(tokens) for tokens in part] for part in (sequences.prompts, completions))
        plan = Packed(prompt_lengths, lengths, [sequences.owners[row] for row in order], self.device)
        packed = [token for part in (*sequences.prompts, *completions) for token in part]
        targets = packed[sum(prompt_lengths) :]
        tokens, wanted = torch.tensor(packed, device=self.device), torch.tensor(targets, device=self.device)
        with self.autocast():
            if self.is_sharded:
                logits = self._of_model(tokens[None], plan.positions, plan, plan.predecessors)[0]  # (M, V)
                logprobs, entropy = token_logprobs(logits, wanted, temperature)
            else:
                before = self._hidden_of_row(tokens, plan)[plan.predecessors]  # (M, D)
                logprobs, entropy = self._gather(before, wanted, temperature)
        return _scatter(logprobs, lengths, order), _scatter(entropy, lengths, order)

    def _gather(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities (M,) of `targets` (M,) and entropies (M,), `tile` tokens at a time."""
        if not 0 < self.tile < len(targets):
            return self._logprobs_of(hidden, targets, temperature)
        parts = [
            checkpoint(self._logprobs_of, rows, wanted, temperature, use_reentrant=False)
            for rows, wanted in zip(hidden.split(self.tile), targets.split(self.tile), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _logprobs_of(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return token_logprobs(self.logits(hidden), targets, temperature)

    def frozen_copy(self, *, on_host: bool = False) -> Policy:
        """The reference: the same weights, never updated. `on_host` keeps them there, to be `brought` for each pass."""
        model = host_copy(self.model) if on_host else copy.deepcopy(self.model)
        model.eval().requires_grad_(False)
        device = self.device if on_host else None
        if on_host:
            for weight in _tensors(model) if torch.cuda.is_available() else ():
                weight.data = weight.data.pin_memory()  # copied several times as fast
        return Policy(model, self.tokenizer, self.name, self.precision, self.end_ids, tile=self.tile, works_on=device)

    @contextmanager
    def brought(self) -> Iterator[None]:
        """Copies of the weights where they are to work, while this lasts; what they are copies of stays at home."""
        home = [(weight, weight.data) for weight in _tensors(self.model)] if self.works_on is not None else []
        try:
            for weight, data in home:
                weight.data = data.to(self.works_on, non_blocking=True, copy=True)
            yield
        finally:
            for weight, data in home:
                weight.data = data

    def sums(self) -> list[float]:
        """The sum of each tensor of weights: equal weights have equal ones."""
        return [float(weight.detach().sum(dtype=torch.float64)) for weight in self.model.parameters()]

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights, with their names, and of the tokenizer: its vocabulary, template and a sentence."""
        weights = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            weights.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        words = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template, self.encode(PROBE)]
        tokenizer = hashlib.sha256(json.dumps(words).encode())
        return {"weights": weights.hexdigest(), "tokenizer": tokenizer.hexdigest()}

    def save(self, path: Path) -> None:
        """Write the model and its tokenizer as a folder that AutoModelForCausalLM and AutoTokenizer open."""
        self.model.save_pretrained(path, safe_serialization=True)
        self.tokenizer.save_pretrained(path)


def host_copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy on the host, for which no second one is made on the device."""
    home = model.device
    found = copy.deepcopy(model.cpu())
    model.to(home)
    return found


def _tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    """The weights of a model and all else that its passes compute with."""
    yield from model.parameters()
    yield from model.buffers()


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) of `targets` (M,) under softmax(logits (M, V) / temperature), and its entropies (M,).

    In float32, as by log_softmax and gather, but with one matrix of float32 for both directions. The entropies carry
    no gradient.
    """
    found = _TokenLogprobs.apply(logits, targets, temperature)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", found)


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        targets = targets[:, None]
        scaled = logits.to(torch.float32, copy=True).div_(temperature)
        everything = scaled.log_softmax(dim=-1)
        chosen = everything.gather(-1, targets)[:, 0]
        probabilities = torch.exp(everything, out=scaled)  # fresh memory would cost more than the arithmetic
        entropy = -everything.mul_(probabilities).sum(dim=-1)
        ctx.save_for_backward(probabilities, targets)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d log p(t) / d logits = (one-hot(t) - p) / temperature."""
        probabilities, targets = ctx.saved_tensors
        scale = gradients[0][:, None] / ctx.temperature
        found = probabilities.mul_(-scale).scatter_add_(-1, targets, scale)  # a second backward pass is refused
        return found.to(ctx.dtype), None, None


def encode(tokenizer: transformers.PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Control tokens written in a message are text like any other: only the template opens and closes turns."""
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True, sanitize_control_tokens=True
    )
    return cast("dict[str, list[int]]", encoded)["input_ids"]


def _scatter(flat: Tensor, lengths: Sequence[int], order: Sequence[int]) -> Tensor:
    """Values (M,) of tokens, row after row -> a padded matrix (B, T), zero elsewhere; row i becomes row order[i]."""
    mask = torch.arange(max(lengths), device=flat.device) < torch.tensor(lengths, device=flat.device)[:, None]
    padded = torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)
    return padded[torch.tensor(order, device=flat.device).argsort()]


def detect_device(wanted: str) -> torch.device:
    """The device that `wanted` names; "auto" takes CUDA, then MPS, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[wanted]:
        usable = ", ".join(f"`{name}`" for name, there in available.items() if there)
        raise CountdownError(f"device `{wanted}` is not available here", f"use `--device auto`, or one of {usable}")
    return torch.device(wanted)


def detect_precision(wanted: str, device: torch.device) -> str:
    """The precision that `wanted` names; "auto" computes in bfloat16 over float32 weights where the hardware does."""
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        # torch has no public query for bfloat16 matrix hardware on a CPU.
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16-master" if fast else "float32"
    return "bf16-master" if device.type == "cuda" else "float32"


def weights_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the model's weights. On a GPU memory is dear: there the optimizer alone keeps float32."""
    bfloat16 = precision == "bf16" or (precision == "bf16-master" and device.type == "cuda")
    return torch.bfloat16 if bfloat16 else torch.float32


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

    Raises CountdownError for a folder that is not there, weights that are missing, misshapen or not safetensors, a
    tokenizer that does not fit the model or has no chat template, and an architecture without full attention.
    """
    source, local = find(name)
    place = detect_device(device)
    # A CPU takes a hundred times as long for numbers below 1e-38, of which sharp attention makes many.
    torch.set_flush_denormal(True)
    chosen = detect_precision(precision, place)
    dtype = weights_dtype(chosen, place)
    if local:
        _check_size(name, Path(source))
    model = _load_model(name, source, local=local, dtype=dtype)
    tokenizer = load_tokenizer(name)
    _check_fit(name, model, tokenizer)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.train()  # checkpointing is active in training mode alone; no layer has dropout
    end_ids = _end_ids(name, model, tokenizer)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=list(end_ids), pad_token_id=tokenizer.pad_token_id
    )
    return Policy(model if on_host else model.to(place), tokenizer, name, chosen, end_ids)


def number_of_layers(name: str) -> int:
    """How many layers a model has, by its config alone."""
    return int(_config(name).get_text_config().num_hidden_layers)


def _config(name: str) -> transformers.PreTrainedConfig:
    source, local = find(name)
    with _load_errors(name):
        found = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        return cast("transformers.PreTrainedConfig", found)


def skeleton(name: str, *, dtype: torch.dtype, layers: int) -> transformers.PreTrainedModel:
    """The first layers of a model between its ends, on the meta device, which holds no weights: from its config alone.

    Raises CountdownError as `load` does.
    """
    config = _config(name)
    text = config.get_text_config()
    with _load_errors(name):
        if getattr(text, "layer_types", None):
            text.layer_types = (text.layer_types * layers)[:layers]
        text.num_hidden_layers = layers
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
            )
    _check_attention(name, text)
    return cast("transformers.PreTrainedModel", model.eval())


def find(name: str) -> tuple[str, bool]:
    """Where a model's files are: (folder or hub id, whether it is local).

    Checked here, so that a mistyped folder is not looked for on a hub.
    """
    if name == "builtin":
        return str(BUILTIN), True
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CountdownError(f"`{name}` is not a model folder: it has no config.json", "name the folder itself")
        return name, True
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or path.parent.exists():
        raise CountdownError(
            f"no model at `{name}`", "use `builtin`, a run's name, a model folder, or a hub id `owner/name`"
        )
    return name, False


def _check_size(name: str, folder: Path) -> None:
    """Refuse a config.json that asks for far more than its weights hold, before anything of that size is made."""
    with _load_errors(name):
        tensors = [shape for path in folder.glob("*.safetensors") for shape in _shapes(path)]
        held = sum(map(math.prod, tensors))
        config, _ = transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        layers = config.get("num_hidden_layers", 0)
        described = 0
        if tensors and isinstance(layers, int) and layers <= len(tensors):
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(
                    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True),
                    trust_remote_code=False,
                )
            described = sum(math.prod(parameter.shape) for parameter in model.parameters())
    if not tensors:
        return  # said better where the weights are loaded
    if not isinstance(layers, int) or layers > len(tensors) or described > 2 * held:
        size = f"{described:,} weights" if described else f"{layers} layers"
        raise CountdownError(
            f"the config.json of `{name}` describes {size}, its files hold {held:,} in {len(tensors)} tensors",
            "save the model again",
        )


def _shapes(path: Path) -> list[list[int]]:
    with safe_open(path, framework="pt") as file:
        return [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (it is no mapping)


def _load_model(name: str, source: str, *, local: bool, dtype: torch.dtype) -> transformers.PreTrainedModel:
    with _load_errors(name):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=ATTENTION,
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
    _check_attention(name, model.config.get_text_config())
    for key, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CountdownError(f"the weights of `{name}` are not finite: {key}", "use an earlier save of the model")
    model.eval()
    return model


def _check_attention(name: str, config: transformers.PreTrainedConfig) -> None:
    """Refuse what `shared_prefix_attention` does not compute: windows and capped scores."""
    layers = getattr(config, "layer_types", None) or []
    limits = [getattr(config, key, None) for key in ("sliding_window", "attn_logit_softcapping")]
    if any(kind != "full_attention" for kind in layers) or any(limits):
        raise CountdownError(
            f"`{name}` has layers without plain full attention, and only that is supported",
            "use a model of the Qwen2.5 family",
        )


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model, alone; CountdownError if it has no chat template."""
    source, local = find(name)
    with _load_errors(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        probe = encode(tokenizer, PROBE) if tokenizer.chat_template else []
    if not tokenizer.chat_template:
        raise CountdownError(f"the tokenizer of `{name}` has no chat template", "use an instruction-tuned model")
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
        raise CountdownError(
            f"cannot load `{name}`: {reason}", "check the name, the folder's files and the network"
        ) from error


def _check_fit(name: str, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    rows = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise CountdownError(
            f"the tokenizer of `{name}` has {len(tokenizer)} tokens, its model only {rows}",
            "use the tokenizer that the model was trained with",
        )


def _end_ids(
    name: str, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every end-of-sequence id: those of the generation settings, the config and the tokenizer."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found |= {end for end in (ids if isinstance(ids, list) else [ids]) if isinstance(end, int)}
    if not found:
        raise CountdownError(f"`{name}` has no end-of-sequence token", "set `eos_token` in its tokenizer_config.json")
    return tuple(sorted(found))
