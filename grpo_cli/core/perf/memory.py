"""Plan the memory of a training before any weight is loaded, and choose a configuration that fits.

Sizes follow from shapes: weights, optimizer state, KV cache, logits, and the activations saved for the backward pass.
The planner picks the fastest configuration that fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
import transformers

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import resident
from grpo_cli.core.model import llama
from grpo_cli.core.model.load import (
    detect_precision,
    free_memory,
    number_of_layers,
    require_context,
    skeleton,
    weights_dtype,
)
from grpo_cli.core.model.lora import Lora, adapter_sizes
from grpo_cli.core.model.master_weights import PART_WEIGHTS
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import ATTENTION, ComputePath
from grpo_cli.core.rollout.decode import ROUNDED

GB = 1e9
GPU_MARGIN = 0.05  # share of a GPU's free memory reserved for fragmentation
CPU_SHARE = 0.7  # share of the host's free memory to plan for: OOM cannot be caught there
CPU_SLACK = 0.25  # share of temporary memory added for fragmentation and kernels' workspaces
CPU_KERNELS = 100_000_000  # bytes of kernels' code and buffers, loaded by the first pass
LIBRARIES = 500_000_000  # bytes of CUDA's own libraries
NCCL = 1_000_000_000  # bytes of NCCL's buffers, with several processes; not measured
WORKSPACE = 2**25  # bytes of cuBLAS's workspace for each of two streams: training and captured steps
LOGIT_CHUNKS = (0, 4096, 1024)  # tokens whose logits are computed at once; 0 is all

# Costs of choices, in tokens of a forward pass.
OVERHEAD = 500  # one more micro-batch: launches, and rows too few to fill a GPU
UPLOAD = 4000  # copying the reference from the host: 2 bytes per weight at 50 GB/s, versus 2 FLOP at 200 TFLOP/s

MIN_8BIT = 4096  # bitsandbytes keeps the moments of smaller tensors in float32
BLOCK_8BIT = 256  # 8-bit values that share one float32 scale

Amounts = dict[str, int]  # bytes by component


@dataclass(frozen=True)
class Work:
    """P prompts of L tokens with G completions of C tokens per step; evaluations of `eval_rows` completions at once."""

    device: str  # its type
    precision: str
    optimizer: str
    prompts: int
    generations: int
    prompt_tokens: int
    new_tokens: int
    eval_rows: int
    has_reference: bool
    ranks: int = 1  # processes that share the prompts
    shards: int = 1  # shards of weights, gradients, moments and reference
    adapter: Lora | None = None  # trained instead of the weights; needs no separate reference
    decodes: bool = True  # samples by itself; otherwise vLLM does

    @property
    def rows(self) -> int:
        return self.prompts * self.generations

    @classmethod
    def of(
        cls, settings: Settings, *, device: torch.device, optimizer: str, prompt_tokens: int, ranks: int = 1
    ) -> Work:
        """The work of one of `ranks` processes that share a training's prompts."""
        train = settings.train
        return cls(
            device=device.type,
            precision=detect_precision(settings.model.precision, device),
            optimizer=optimizer,
            prompts=-(-train.batch_size // ranks),
            generations=train.num_generations,
            prompt_tokens=prompt_tokens,
            new_tokens=train.max_new_tokens,
            eval_rows=settings.eval.batch_size,
            has_reference=settings.loss.beta > 0,
            ranks=ranks,
            shards=ranks if settings.ranks.shard else 1,
            adapter=Lora.of(settings),
            decodes=settings.model.rollout == "local",
        )


@dataclass(frozen=True)
class Choices:
    """Where and how to compute; the results do not depend on it."""

    logit_chunk: int = 0  # tokens whose logits are computed at once; 0 is all
    rows: int = 0  # completions per forward and backward pass; 0 is the whole step
    checkpointing: bool = False
    on_host: bool = False  # the reference's weights are on the host


@dataclass(frozen=True)
class MemoryPlan:
    """Peak bytes of each phase of a step, and the memory budget."""

    phases: dict[str, Amounts]
    choices: Choices
    room: int
    limit: int = 0  # hard limit of the process in bytes, or 0 if OOM can be caught

    @property
    def peak(self) -> int:
        return max(sum(amounts.values()) for amounts in self.phases.values())


def moment_bytes(shapes: Iterable[torch.Size], dtype: torch.dtype, optimizer: str) -> int:
    """Bytes of the moments of weights with these shapes and dtype."""
    counts = [shape.numel() for shape in shapes]
    if optimizer == "adamw":
        return int(2 * dtype.itemsize * sum(counts))
    return sum(8 * n if n < MIN_8BIT else 2 * (n + 4 * -(-n // BLOCK_8BIT)) for n in counts)


def _is_list(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.ModuleList) and len(module) > 0


def _size(config: transformers.PreTrainedConfig, name: str) -> int:
    """A size in a config, the largest if it differs by layer; 0 if absent."""
    try:
        sizes = getattr(config, name, None)
    except RuntimeError:  # raised where it differs by layer
        sizes = [getattr(layer, name) for layer in config.per_layer_config]
    return int(max(sizes) if isinstance(sizes, list) else sizes or 0)


class Planner:
    """Memory and time of one model for one kind of work."""

    def __init__(self, name: str, work: Work, path: ComputePath | None = None) -> None:
        """`path`: what the self-check chose; a plain path may also follow from the config."""
        self.work, self.layers = work, number_of_layers(name)
        self.dtype = weights_dtype(work.precision, torch.device(work.device))
        # Architectures name their layers differently; they are the first ModuleList. Some count two for each.
        models = (skeleton(name, dtype=self.dtype, layers=layers) for layers in (1, 2))
        model, layer = next((model, layers[0]) for model in models for layers in model.modules() if _is_list(layers))
        within = {id(weight) for weight in layer.parameters()}
        ends = [weight.shape for weight in model.parameters() if id(weight) not in within]
        per_layer = [weight.shape for weight in layer.parameters()]
        self.shapes = ends + per_layer * self.layers
        self._ends, self._layer = (sum(shape.numel() for shape in shapes) for shapes in (ends, per_layer))
        self.count = sum(shape.numel() for shape in self.shapes)
        config = model.config.get_text_config()
        require_context(name, config, work.prompt_tokens + work.new_tokens)
        self.plain = isinstance(path, PlainPath) or model.config._attn_implementation != ATTENTION
        own_logits = isinstance(path, PackedPath) and path.own_logits
        self.can_chunk = not (self.plain or own_logits or work.shards > 1)  # as `PackedPath.logprobs`
        self._has_scores = self.plain and not model._supports_sdpa  # (H, T, T) of each row
        # Queries and keys, normed in float32 and rotated after that.
        self._norms_heads = any(re.search(r"\b(q|query)_(layer)?norm\b", name) for name, _ in layer.named_modules())
        self._width, self._vocabulary = config.hidden_size, config.vocab_size
        self._inner = _size(config, "intermediate_size") or 4 * config.hidden_size
        heads = _size(config, "num_attention_heads") or 1  # absent in state-space models
        head = _size(config, "head_dim") or config.hidden_size // heads
        self._heads, self._queries = heads, heads * head
        self._keys = (_size(config, "num_key_value_heads") or heads) * head
        adapter, self._adapted, self._largest = adapter_sizes(model, work.adapter) if work.adapter else (0, 0, 0)
        self._adapter, self._adapted = adapter * self.layers, self._adapted * self.layers
        self._nf4 = work.adapter is not None and work.adapter.nf4
        self.has_masters = (
            not work.adapter and work.precision == "bf16-master" and self.dtype == torch.bfloat16 and work.shards == 1
        )
        is_fused = work.device == "cuda" and not self.plain and path in (None, PackedPath(fused=True))
        # Bytes per value in matrix multiplications. Autocast on a CPU keeps a float32 copy beside bfloat16.
        self._computed = 4 if work.precision == "float32" or work.device == "cpu" else 2
        # A fused kernel keeps the logits and their gradient; otherwise probabilities and a temporary in float32, too.
        self._per_logit = 2 * self._computed if is_fused else self._computed + 8
        self._merges = work.device == "cpu" and work.shards == 1 and llama.fits(model) and not self._nf4

    def plan(self, choices: Choices, *, room: int = 0) -> MemoryPlan:
        """The plan with these choices."""
        stays = self._stays(choices)
        phases = {"rollout": self._rollout()}
        if self.work.has_reference:
            phases["reference"] = self._pass(choices, learn=False) | {"reference": self._reference}
        phases["update"] = self._pass(choices, learn=True)
        phases["optimizer"] = {"gradients": self._gradients, "working room": self._optimizer_room()}
        whole = {phase: self._with_slack(stays | amounts, stays) for phase, amounts in phases.items()}
        alone = self.work.device == "cpu" and self.work.shards == 1  # a shard cannot repeat a pass
        return MemoryPlan(whole, choices, room, room if alone else 0)

    def cost(self, choices: Choices) -> float:
        """Time of reference pass and update, in tokens of a forward pass."""
        work, rows = self.work, choices.rows or self.work.rows
        passes = -(-work.rows // rows)
        completions = work.rows * work.new_tokens
        tokens = completions + passes * self._prompts_of(rows) * work.prompt_tokens
        forward = 3 + choices.checkpointing + work.has_reference  # a backward pass costs two forward passes
        chunked = 0 < choices.logit_chunk < rows * work.new_tokens
        recomputed = self.shapes[0].numel() / self.count * completions + rows / choices.logit_chunk if chunked else 0
        return tokens * forward + passes * OVERHEAD + recomputed + UPLOAD * choices.on_host

    def _prompts_of(self, rows: int) -> int:
        """The most prompts that `rows` consecutive completions belong to."""
        each = self.work.generations
        if self.plain:
            return rows
        return min(self.work.prompts, rows // each if rows % each == 0 else (rows - 2) // each + 2 if rows > 1 else 1)

    def _with_slack(self, amounts: Amounts, stays: Amounts) -> Amounts:
        """On a CPU, also memory of the process outside tensors, and fragmentation of temporary memory."""
        if self.work.device != "cpu":
            return amounts
        passing = sum(amounts.values()) - sum(stays.values())
        return amounts | {"process": resident() + CPU_KERNELS + int(CPU_SLACK * passing)}

    @property
    def _learned(self) -> torch.dtype:
        """The dtype of the trained weights; sharded ones are their own masters."""
        if self.work.adapter:
            return torch.float32
        return torch.float32 if self.work.shards > 1 and self.work.precision != "bf16" else self.dtype

    @property
    def _gradients(self) -> int:
        """Bytes on this device of one value per weight, in the trained dtype."""
        count = self._adapter if self.work.adapter else self.count
        return int(-(-count * self._learned.itemsize // self.work.shards))

    @property
    def _reference(self) -> int:
        return self._gradients if self.work.has_reference and not self.work.adapter else 0

    @property
    def _weights(self) -> int:
        """Bytes of the model. 64 values of nf4 share a scale of 8 bits, and 256 scales a constant."""
        quantized = self._adapted if self._nf4 else 0
        return int((self.count - quantized) * self.dtype.itemsize + quantized * (0.5 + 1 / 64 + 4 / 2**14))

    def _stays(self, choices: Choices) -> Amounts:
        """Persistent memory. A GPU keeps the samplers of training and of evaluation."""
        work = self.work
        shapes = [torch.Size([self._adapter])] if work.adapter else self.shapes
        moments = moment_bytes(shapes, torch.float32 if self.has_masters else self._learned, work.optimizer)
        stays = {
            "weights": self._weights if work.decodes or work.shards == 1 else 0,  # sharded ones are gathered to decode
            "adapter": 4 * self._adapter,
            "master": self._gradients if work.shards > 1 else 4 * self.count if self.has_masters else 0,
            "moments": -(-moments // work.shards),
            "reference": 0 if choices.on_host else self._reference,
        }
        return stays | self._sampling() if work.device == "cuda" else stays

    def _sampling(self) -> Amounts:
        """Persistent sampling memory: KV cache, and per logit float32 probabilities and a float64 sum."""
        work, static = self.work, self.work.device == "cuda"
        if not work.decodes:
            return {}
        longest = -(-work.prompt_tokens // ROUNDED) * ROUNDED if static else work.prompt_tokens
        token = self.layers * 2 * self._keys * self.dtype.itemsize
        batches = [(work.rows if self.plain else work.prompts, work.rows), (work.eval_rows, work.eval_rows)]
        caches = [(prompts * longest + rows * work.new_tokens) * token for prompts, rows in batches]
        chosen = [rows * self._vocabulary * (self.dtype.itemsize + 16) for _, rows in batches]
        together = sum if static else max
        # A captured step owns its temporaries: a layer's activations, and scores with their softmax.
        layer = (4 * self._width + 3 * self._inner + 2 * self._queries) * self.dtype.itemsize
        scores = 12 * self._heads * (longest + work.new_tokens)
        recorded = 2 * WORKSPACE + sum(rows * (layer + scores) for _, rows in batches) if static else 0
        return {"KV cache": together(caches), "sampling": together(chosen) + recorded}

    def _rollout(self) -> Amounts:
        """Prefill: keys of all layers, and one layer's values. `llama` decodes with merged copies of its layers."""
        work, size = self.work, self.dtype.itemsize
        tokens = max(work.rows if self.plain else work.prompts, work.eval_rows) * work.prompt_tokens * work.decodes
        kept = self.layers * 2 * self._keys + 4 * self._width + 3 * self._inner
        merged = self.layers * self._layer * size if self._merges else 0
        merged += size * (self._largest if self._nf4 else self._adapted if self._merges else 0)
        amounts = {"activations": tokens * kept * size, "working room": merged}
        if self.plain:  # many models compute the logits of the whole prompt
            amounts["logits"] = tokens * self._vocabulary * self._computed
        return amounts if work.device == "cuda" else amounts | self._sampling()

    def _pass(self, choices: Choices, *, learn: bool) -> Amounts:
        """The peak of a reference pass, or of an update with all gradients counted from the start."""
        work, rows = self.work, choices.rows or self.work.rows
        tokens = rows * work.new_tokens + self._prompts_of(rows) * work.prompt_tokens
        # Norms and residuals are float32; the rest has the dtype of the multiplications.
        values = 4 * self._inner + 3 * self._width + 2 * self._queries + 2 * self._keys
        layer = tokens * (self._computed * values + 16 * self._width)
        layer += tokens * 12 * (self._queries + self._keys) * self._norms_heads
        layer += rows * work.prompt_tokens * 2 * self._keys * self._computed  # the prompt's keys beside each completion
        if self._has_scores:  # in float32 too
            layer += rows * self._heads * (work.prompt_tokens + work.new_tokens) ** 2 * (self._computed + 4)
        boundary = tokens * self._width * self.dtype.itemsize
        kept = (self.layers * (boundary if choices.checkpointing else layer)) if learn else boundary
        logits = min(choices.logit_chunk or rows * work.new_tokens, rows * work.new_tokens)
        amounts = {"activations": kept + layer, "logits": logits * self._vocabulary * self._per_logit}
        if self.plain:
            amounts["logits"] += tokens * self._vocabulary * self._computed
        copies = self._gathered(learn=learn)
        if work.device == "cpu":  # copies in the dtype of the multiplications, and `llama`'s merged layers
            copies += 2 * self.count * (work.precision != "float32") + self._rollout()["working room"]
        return amounts | {"working room": copies} | ({"gradients": self._gradients} if learn else {})

    def _gathered(self, *, learn: bool) -> int:
        """Bytes that FSDP gathers at a time: embeddings and two layers; with gradients, in both dtypes, to reduce."""
        if self.work.shards == 1:
            return 0
        computed = 2 if self.work.device == "cuda" and self.work.precision != "float32" else self._learned.itemsize
        gradients = (computed + self._learned.itemsize) * (self._ends + self._layer) if learn else 0
        return int(computed * (self._ends + 2 * self._layer) + gradients)

    def _optimizer_room(self) -> int:
        """Temporary bytes of the optimizer: float32 gradients, and for torch's AdamW on a GPU a copy of them.

        Sharded weights are gathered one at a time to copy them to the sampler.
        """
        largest = max(shape.numel() for shape in self.shapes)
        part = min(self.count, max(PART_WEIGHTS, largest)) if self.has_masters else 0
        foreach = self.work.optimizer == "adamw" and self.work.device == "cuda"
        copies = (4 * part or self._gradients) if foreach else 0
        return max(4 * part + copies, self._learned.itemsize * largest if self.work.shards > 1 else 0)


def find(
    planner: Planner, *, room: int, rows: int = 0, checkpointing: bool | None = None, on_host: bool | None = None
) -> MemoryPlan:
    """The fastest plan that fits in `room` bytes; given choices are kept.

    Raises CountdownError if none fits.
    """
    work = planner.work
    halves = [-(-work.rows // 2**halved) for halved in range(1, work.rows.bit_length() + 1)]
    sizes = [rows] if rows else [0, *dict.fromkeys(size for size in halves if size < work.rows)]
    copied = work.has_reference and work.shards == 1 and not work.adapter
    hosts = [False, True] if copied and work.device != "cpu" else [False]
    if on_host is not None and copied:
        hosts = [on_host]
    options = [
        Choices(logit_chunk, size, recomputed, host)
        for recomputed, host, size, logit_chunk in product(
            [False, True] if checkpointing is None else [checkpointing],
            hosts,
            sizes,
            LOGIT_CHUNKS if planner.can_chunk else LOGIT_CHUNKS[:1],
        )
        if not logit_chunk or logit_chunk < (size or work.rows) * work.new_tokens
    ]
    plans = [planner.plan(choices, room=room) for choices in sorted(options, key=planner.cost)]
    for plan in plans:
        if plan.peak <= room:
            return plan
    least = min(plan.peak for plan in plans)
    raise CountdownError(
        f"this training needs at least {least / GB:.1f} GB of memory, and {room / GB:.1f} GB can be used",
        "use a smaller `--max-new-tokens`, `--batch-size` or model, `--optimizer adamw8bit`, `--precision bf16`, or"
        " more processes with `--shard`; `--memory` sets how many GB to plan for",
    )


def room(settings: Settings, work: Work, *, free: int = 0) -> int:
    """Memory budget in bytes: from the settings, or from `free` bytes (by default, those free now).

    On a CPU it covers the whole process, including the memory that it already uses.
    """
    given = int(settings.model.memory * GB)
    if work.device == "cpu":
        return given or host_limit(free=free, ranks=work.ranks)
    free = given or free or free_memory(torch.device(work.device))
    libraries = LIBRARIES + (NCCL if work.ranks > 1 else 0) if work.device == "cuda" else 0
    share = settings.model.vllm_memory if not work.decodes and settings.model.vllm_url == "none" else 0.0
    return int(free * (1 - GPU_MARGIN - share)) - libraries


def host_limit(*, free: int = 0, ranks: int = 1) -> int:
    """Bytes that this process may hold on a CPU: a share of those free, by default now, besides those it holds."""
    return int(CPU_SHARE * (free or free_memory(torch.device("cpu"))) / ranks) + resident()


def plan_for(
    name: str, work: Work, settings: Settings, *, free: int = 0, path: ComputePath | None = None
) -> MemoryPlan:
    """The plan for a training with these settings in the memory that `room` allows; raises as `find` does."""
    return find(
        Planner(name, work, path),
        room=room(settings, work, free=free),
        rows=settings.train.micro_batch_size,
        checkpointing={"auto": None, "on": True, "off": False}[settings.model.gradient_checkpointing],
        on_host={"auto": None, "host": True, "device": False}[settings.model.reference],
    )


def limit(settings: Settings, device: torch.device) -> None:
    """Limit this process to the memory in the settings, if the device supports it."""
    if settings.model.memory and device.type == "cuda":
        share = settings.model.memory * GB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
