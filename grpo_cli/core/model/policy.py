"""A causal language model with its tokenizer: log-probabilities, save.

A model's own generation settings are ignored: every model is sampled in the same way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_cli.core.model import lora
from grpo_cli.core.model.attention import Plan, shared_prefix_attention, sum_dtype
from grpo_cli.core.model.logprobs import Entropy
from grpo_cli.core.model.templates import PROBE, encode, opening

ATTENTION = "countdown_shared_prefix"

transformers.AttentionInterface.register(ATTENTION, shared_prefix_attention)
transformers.utils.logging.set_verbosity_error()  # loading errors are checked and raised by this package
transformers.utils.logging.set_tqdm_hook(lambda make, args, options: make(*args, **{**options, "disable": True}))


@dataclass(frozen=True)
class Sequences:
    """Prompts and completions as token ids; completion r answers prompt `prompt_index[r]`."""

    prompts: list[list[int]]
    completions: list[list[int]]
    prompt_index: list[int]

    def mask(self) -> Tensor:
        """(B, T) boolean: which entries of a padded matrix of completion tokens are real. Built from lengths."""
        lengths = torch.tensor([len(completion) for completion in self.completions])
        return torch.arange(max(lengths.tolist(), default=0)) < lengths[:, None]

    def subset(self, rows: Sequence[int]) -> Sequences:
        """The completions `rows`, with only their prompts."""
        used = sorted({self.prompt_index[row] for row in rows})
        number = {prompt: index for index, prompt in enumerate(used)}
        completions = [self.completions[row] for row in rows]
        return Sequences([self.prompts[p] for p in used], completions, [number[self.prompt_index[row]] for row in rows])


class ComputePath(Protocol):
    """A way to compute log-probs: `PackedPath` or `PlainPath`."""

    def logprobs(
        self, policy: Policy, sequences: Sequences, *, temperature: float, entropy: Entropy, logit_chunk: int
    ) -> tuple[Tensor, Tensor]:
        """As `Policy.logprobs`."""


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer on a device."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    name: str
    precision: str
    end_ids: tuple[int, ...]
    path: ComputePath  # how it computes
    adapter: lora.Lora | None = None  # the trained adapter, if any
    is_sharded: bool = False  # weights are sharded; all ranks call the model together

    @property
    def device(self) -> torch.device:
        return cast("torch.device", self.model.device)

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Chat messages -> token ids of the prompt, by the model's chat template."""
        return encode(self.tokenizer, messages)

    def decode(self, tokens: Sequence[int]) -> str:
        """Completion ids -> text, with the tag that the prompt opens and without end-of-sequence tokens."""
        written = [token for token in tokens if token not in self.end_ids]
        return self.opening + str(self.tokenizer.decode(written, clean_up_tokenization_spaces=False))

    def encode_completion(self, text: str) -> list[int]:
        """Text -> completion ids, without the tag that the prompt opens."""
        tag = self.opening[: self.opening.find(">") + 1]
        if tag and text.startswith(tag):
            text = text.removeprefix(tag)
            text = text.lstrip() if self.opening[-1].isspace() else text
        return cast("dict[str, list[int]]", self.tokenizer(text, add_special_tokens=False))["input_ids"]

    @cached_property
    def opening(self) -> str:
        """The end of every prompt that counts for the completion: a tag that the template opens."""
        return opening(self.tokenizer)

    @property
    def end_id(self) -> int:
        """The end-of-sequence token that completes an answer: the tokenizer's, or the model's."""
        end = self.tokenizer.eos_token_id
        return end if isinstance(end, int) else self.end_ids[0]

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of a forward pass: bfloat16 over float32 weights if the precision says so."""
        enabled = self.precision == "bf16-master" and not self.has_masters
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @property
    def has_masters(self) -> bool:
        """Whether the weights are bfloat16 and the optimizer keeps float32 masters."""
        return self.precision == "bf16-master" and self.model.dtype == torch.bfloat16 and self.adapter is None

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The trained weights: all of them, or the adapter's."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def hidden(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Final hidden states (B, T, D) of `tokens` (B, T) at `positions` (B, T), attending by `plan`."""
        decoder = self.model.get_decoder()
        output = decoder(input_ids=tokens, position_ids=positions, use_cache=False, plan=plan)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return self.model.get_output_embeddings()(hidden)  # type: ignore[no-any-return]

    def logprobs(
        self, sequences: Sequences, *, temperature: float, entropy: Entropy = "value", logit_chunk: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, both (B, T) float32, of each completion token under the sampling distribution.

        That is softmax(logits / temperature), in float32. Padding is 0. Entropy is 0, or has a gradient, where asked
        for. Only the logits of `logit_chunk` tokens are kept in memory at once, if not 0 and on a path that can.
        """
        return self.path.logprobs(self, sequences, temperature=temperature, entropy=entropy, logit_chunk=logit_chunk)

    def sums(self) -> list[float]:
        """The sum of each weight tensor, to compare weights."""
        return [float(weight.detach().sum(dtype=sum_dtype(self.device))) for weight in self.model.parameters()]

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights and their names, without an adapter's, and of the tokenizer.

        The tokenizer's hash covers its vocabulary, its template and a sample sentence.
        """
        weights = hashlib.sha256()
        for name, tensor in sorted(lora.base_state(self.model).items()):
            weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            weights.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
        words = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template, self.encode(PROBE)]
        tokenizer = hashlib.sha256(json.dumps(words).encode())
        return {"weights": weights.hexdigest(), "tokenizer": tokenizer.hexdigest()}

    def save(self, path: Path) -> None:
        """Write the model and its tokenizer to a folder for AutoModelForCausalLM and AutoTokenizer.

        An adapter is merged into the weights.
        """
        state = lora.merged_state(self.model) if self.adapter else None
        self.model.save_pretrained(path, safe_serialization=True, state_dict=state)
        self.tokenizer.save_pretrained(path)
        _write_older_rotary(path / "config.json")
        for weights in path.glob("*.safetensors"):
            shutil.copymode(path / "config.json", weights)  # safetensors creates files that only the owner can read


def _write_older_rotary(path: Path) -> None:
    """Add the rotary settings in the form that transformers 4 reads: it ignores `rope_parameters`."""
    config = json.loads(path.read_text("utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # no rotary positions, or other ones by kind of layer
        return
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
    path.write_text(json.dumps(config | older, indent=2, sort_keys=True) + "\n", "utf-8")


def set_attention(model: transformers.PreTrainedModel, *, plain: bool) -> bool:
    """Attend by plans, or as the model itself does if `plain`. Returns whether the model supports it."""
    implementation = ("sdpa" if model._supports_sdpa else "eager") if plain else ATTENTION
    with suppress(ValueError, ImportError):  # a model without the implementation keeps its own
        model.set_attn_implementation(implementation)
    return plain or model.config._attn_implementation == ATTENTION


def checkpoint_layers(model: transformers.PreTrainedModel) -> None:
    """Recompute each layer in the backward pass. Layers compute as in eval mode, without dropout.

    transformers checkpoints a layer in training mode; its submodules stay in eval mode.
    """
    model.activation_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
                setattr(module, name, 0.0)
