"""How much memory a training needs, part by part, and what makes it fit: found before any weight is loaded.

The real passes run on the meta device, which has shapes and no memory, with two layers and with three; what is live
at their peaks grows by the same amount with every further layer. Of the choices that fit, the one that costs least time
is taken. Knows neither puzzles nor files, and nothing of what a device does with memory that it has been given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model import qwen2
from grpo_cli.core.model.load import detect_precision, number_of_layers, skeleton, weights_dtype
from grpo_cli.core.model.master_weights import AT_ONCE
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.perf.outline import Amounts, Outline, checkpointed, sampling_room, traced, traced_prefill
from grpo_cli.core.sampling.decode import ROUNDED

GB = 1e9
MARGIN = 0.05  # share of the free memory that is left alone: what allocators lose between their blocks
LIBRARIES = 500_000_000  # bytes that CUDA's own libraries take beside it
TILES = (0, 4096, 1024)  # tokens whose logits are computed at once; 0 is all

# What a choice costs, in tokens passed forward through the model.
OVERHEAD = 500  # a micro-batch more: launches, and rows too few to fill a GPU
UPLOAD = 4000  # the reference brought from the host: 2 bytes a weight at 50 GB/s, against 2 FLOP at 200 TFLOP/s

MIN_8BIT = 4096  # bitsandbytes keeps the moments of smaller tensors in float32
BLOCK_8BIT = 256  # and one float32 scale for so many 8-bit values


@dataclass(frozen=True)
class Work:
    """What a training does: P prompts of L tokens with G completions of C tokens; `eval_rows` prompts with one each."""

    device: str  # its type
    precision: str
    optimizer: str
    prompts: int
    generations: int
    prompt_tokens: int
    new_tokens: int
    eval_rows: int
    has_reference: bool
    ranks: int = 1  # of which this is one
    shards: int = 1  # into which weights, gradients, moments and reference are cut

    @property
    def rows(self) -> int:
        return self.prompts * self.generations

    @classmethod
    def of(
        cls, settings: Settings, *, device: torch.device, optimizer: str, prompt_tokens: int, ranks: int = 1
    ) -> Work:
        """The work of a training with these settings on a device, one of `ranks` that share its prompts."""
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
        )


@dataclass(frozen=True)
class Choices:
    """Where and how it is computed; nothing of it changes what is computed."""

    logit_chunk: int = 0  # tokens whose logits are computed at once; 0 is all
    rows: int = 0  # completions per forward and backward pass; 0 is the whole step
    checkpointing: bool = False
    on_host: bool = False  # where the reference's weights live


@dataclass(frozen=True)
class MemoryPlan:
    """What a training takes up with the choices made, and the bytes of memory that it may."""

    phases: dict[str, Amounts]  # by phase of a step: what is there at its peak, by component
    origins: dict[str, str]  # by component: what its bytes are computed from
    choices: Choices
    room: int
    reasons: list[str]

    @property
    def peak(self) -> int:
        return max(sum(amounts.values()) for amounts in self.phases.values())


def moment_bytes(shapes: Iterable[torch.Size], dtype: torch.dtype, optimizer: str) -> int:
    """Bytes of the moments of weights of these shapes and this type."""
    counts = [shape.numel() for shape in shapes]
    if optimizer == "adamw":
        return int(2 * dtype.itemsize * sum(counts))
    return sum(8 * n if n < MIN_8BIT else 2 * (n + 4 * -(-n // BLOCK_8BIT)) for n in counts)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that a training may take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Planner:
    """Plans for one model and one kind of work; each pass is traced once."""

    def __init__(self, name: str, work: Work) -> None:
        self.work, self.layers = work, number_of_layers(name)
        self.dtype = weights_dtype(work.precision, torch.device(work.device))
        self.few = [skeleton(name, dtype=self.dtype, layers=layers) for layers in (2, 3)]
        self.has_masters = work.precision == "bf16-master" and self.dtype == torch.bfloat16 and work.shards == 1
        layers = self.few[0].get_decoder().layers
        within = {id(weight) for weight in layers.parameters()}
        ends = [weight.shape for weight in self.few[0].parameters() if id(weight) not in within]
        layer = [weight.shape for weight in layers[0].parameters()]
        self.shapes = ends + layer * self.layers
        self._ends, self._layer = (sum(shape.numel() for shape in shapes) for shapes in (ends, layer))
        self._vocabulary = self.few[0].config.get_text_config().vocab_size
        self.count = sum(shape.numel() for shape in self.shapes)
        self._passes: dict[tuple[int, int, bool, bool], Amounts] = {}
        self._held = self._sampling()

    def plan(self, choices: Choices, *, room: int = 0, reasons: Sequence[str] = ()) -> MemoryPlan:
        """What the work takes up with these choices."""
        stays, rollout = self._stays(choices)
        phases = {"rollout": rollout}
        if self.work.has_reference:
            brought = {"reference": self._reference} if choices.on_host else {}
            phases["reference"] = brought | self._pass(choices, learn=False)
        phases["update"] = self._pass(choices, learn=True)
        phases["optimizer"] = {"gradients": self._gradients, "working room": self._optimizer_room()}
        whole = {phase: stays | amounts for phase, amounts in phases.items()}
        return MemoryPlan(whole, self._origins(choices), choices, room, list(reasons))

    def fits(self, choices: Choices, room: int) -> bool:
        """Whether the work fits; what shows at once that it does not is looked at first."""
        stays = sum(self._stays(choices)[0].values())
        if stays + self._gradients > room:  # which are there whatever is chosen
            return False
        unchunked = self._pass(
            replace(choices, logit_chunk=0), learn=True
        )  # tiles make logits smaller and nothing else
        if (
            stays + unchunked.get("activations", 0) > room
            or stays + sum(self._pass(choices, learn=True).values()) > room
        ):
            return False
        return self.plan(choices).peak <= room

    def cost(self, choices: Choices) -> float:
        """Time of reference pass and update, in tokens passed forward through the model."""
        work, rows = self.work, choices.rows or self.work.rows
        passes = -(-work.rows // rows)
        completions = work.rows * work.new_tokens
        tokens = completions + passes * self._prompts_of(rows) * work.prompt_tokens
        head = self.shapes[0].numel() / self.count
        forward = 3 + choices.checkpointing + work.has_reference  # a backward pass is two forward
        recomputed = head * completions if self._logit_chunks(choices) else 0
        brought = UPLOAD * choices.on_host
        return tokens * forward + passes * OVERHEAD + recomputed + brought + (self._logit_chunks(choices) > 1)

    def _logit_chunks(self, choices: Choices) -> int:
        """Tiles of a micro-batch's logits; 0 if they are computed at once."""
        tokens = (choices.rows or self.work.rows) * self.work.new_tokens
        return -(-tokens // choices.logit_chunk) if 0 < choices.logit_chunk < tokens else 0

    def _prompts_of(self, rows: int) -> int:
        """Prompts that `rows` completions in a row answer, at most."""
        each = self.work.generations
        return min(self.work.prompts, rows // each if rows % each == 0 else (rows - 2) // each + 2 if rows > 1 else 1)

    @property
    def _learned(self) -> torch.dtype:
        """The type of the weights that learn; sharded ones are masters of themselves."""
        return torch.float32 if self.work.shards > 1 and self.work.precision != "bf16" else self.dtype

    def _share(self, bytes_each: int) -> int:
        """Bytes on this device of something that each weight has."""
        return int(-(-self.count * bytes_each // self.work.shards))

    @property
    def _gradients(self) -> int:
        return self._share(self._learned.itemsize)

    @property
    def _reference(self) -> int:
        return self._share(self._learned.itemsize) if self.work.has_reference else 0

    def _gathered(self, *, learn: bool) -> int:
        """Bytes of what is whole of sharded weights at a time: the ends of the model and two layers.

        In an update also the gradients of the ends and of a layer, and again as they are added up.
        """
        if self.work.shards == 1:
            return 0
        computed = 2 if self.work.device == "cuda" and self.work.precision != "float32" else self._learned.itemsize
        gradients = (computed + self._learned.itemsize) * (self._ends + self._layer) if learn else 0
        return int(computed * (self._ends + 2 * self._layer) + gradients)

    def _stays(self, choices: Choices) -> tuple[Amounts, Amounts]:
        """What is there from the first step to the last; and what a rollout adds."""
        work, (sampling, rollout) = self.work, self._held
        master = 4 if self.has_masters else 0
        moments = moment_bytes(self.shapes, torch.float32 if self.has_masters else self._learned, work.optimizer)
        stays = {
            "weights": self.count * self.dtype.itemsize,
            "master": self._share(self._learned.itemsize) if work.shards > 1 else self.count * master,
            "moments": -(-moments // work.shards),
            "reference": 0 if choices.on_host else self._reference,
        }
        return stays | sampling, rollout

    def _sampling(self) -> tuple[Amounts, Amounts]:
        """What sampling has always, and what it adds while it goes on."""
        work, config = self.work, self.few[0].config.get_text_config()
        static = work.device == "cuda"
        width = self.few[0].get_decoder().layers[0].self_attn.head_dim
        token = self.layers * 2 * config.num_key_value_heads * width * self.dtype.itemsize
        longest = -(-work.prompt_tokens // ROUNDED) * ROUNDED if static else work.prompt_tokens
        shapes = [(work.prompts, work.rows), (work.eval_rows, work.eval_rows)]
        caches = [(prompts * longest + rows * work.new_tokens) * token for prompts, rows in shapes]
        rooms = [sampling_room(rows, config.vocab_size, self.dtype) for _, rows in shapes]
        # The samplers of a GPU stay, training's beside evaluation's; elsewhere one comes and goes.
        together = sum if static else max
        sampling = {"KV cache": together(caches), "sampling": together(rooms)}
        rollout = self._prefill()
        return (sampling, rollout) if static else ({}, sampling | rollout)

    def _prefill(self) -> Amounts:
        """The peak of reading the prompts; a CPU also copies the weights of its layers to decode with."""
        work, policies = self.work, [self._policy(model) for model in self.few]
        prompts = max(work.prompts, work.eval_rows)
        found = self._grown(*(traced_prefill(policy, prompts, work.prompt_tokens) for policy in policies))
        copies = 0 if work.device == "cuda" else (self.count - self.shapes[0].numel()) * self.dtype.itemsize
        return found | {"working room": copies}

    def _policy(self, model: Any, *, logit_chunk: int = 0) -> Policy:
        written = self.work.device == "cpu" and self.work.shards == 1 and qwen2.fits(model)
        return Outline(model, cast("Any", None), "", self.work.precision, logit_chunk=logit_chunk, written=written)

    def _grown(self, two: Amounts, three: Amounts) -> Amounts:
        """What two and three layers take up -> what all do."""
        return {
            name: two.get(name, 0) + (self.layers - 2) * (three.get(name, 0) - two.get(name, 0))
            for name in two.keys() | three.keys()
        }

    def _pass(self, choices: Choices, *, learn: bool) -> Amounts:
        """Bytes at the peak of an update or of the reference pass, by what they hold."""
        rows = choices.rows or self.work.rows
        key = (choices.logit_chunk if self._logit_chunks(choices) else 0, rows, choices.checkpointing and learn, learn)
        if key not in self._passes:
            self._passes[key] = self._traced(*key)
        return self._passes[key]

    def _traced(self, logit_chunk: int, rows: int, checkpointing: bool, learn: bool) -> Amounts:
        work, prompts = self.work, self._prompts_of(rows)
        prompt_index = sorted(row % prompts for row in range(rows))
        sequences = Sequences([[0] * work.prompt_tokens] * prompts, [[0] * work.new_tokens] * rows, prompt_index)
        summed = work.ranks > work.shards  # over ranks: gradients have their place before the first pass
        again = learn and (rows < work.rows or summed)
        found = []
        for model in self.few:
            with checkpointed(model, wanted=checkpointing):
                found.append(traced(self._policy(model, logit_chunk=logit_chunk), sequences, learn=learn, again=again))
        peaks = [self._grown(two, three) for two, three in zip(*found, strict=True)]
        if work.shards > 1:
            spread = {"working room": self._gathered(learn=learn), "gradients": self._gradients if learn else 0}
            peaks = [peak | spread for peak in peaks]
        largest = max(peaks, key=lambda amounts: sum(amounts.values()))
        return largest | {"gradients": self._gradients} if again else largest

    def _optimizer_room(self) -> int:
        """Bytes of what the optimizer makes for a while: gradients in float32, and torch's AdamW on a GPU a copy.

        Sharded weights are then made whole for their copy, one after the other.
        """
        largest = max(shape.numel() for shape in self.shapes)
        at_once = min(self.count, max(AT_ONCE, largest)) if self.has_masters else 0
        foreach = self.work.optimizer == "adamw" and self.work.device == "cuda"
        copies = (4 * at_once or self._gradients) if foreach else 0
        whole = self._learned.itemsize * largest if self.work.shards > 1 else 0
        return max(4 * at_once + copies, whole)

    def _origins(self, choices: Choices) -> dict[str, str]:
        work, rows, dtype = self.work, choices.rows or self.work.rows, str(self.dtype).removeprefix("torch.")
        prompts = self._prompts_of(rows)
        several = "and" if work.device == "cuda" else "or"
        spread = f", a share of {work.shards}" if work.shards > 1 else ""
        learned = str(self._learned).removeprefix("torch.")
        recomputed = ", kept between layers alone" if choices.checkpointing else ""
        return {
            "weights": f"{self.count:,} weights in {dtype}" + (", a copy that samples" if spread else ""),
            "master": f"the same in {learned}, which the optimizer moves{spread}",
            "gradients": f"of the weights, in {learned}; those there at the peak{spread}",
            "moments": f"two {'in 8 bits, with scales' if work.optimizer == 'adamw8bit' else 'of each weight'}{spread}",
            "reference": "the weights again"
            + (", brought from the host for its pass" if choices.on_host else "")
            + (f" in {learned}{spread}" if spread else ""),
            "KV cache": f"{work.prompts} x {work.generations} completions, {several} {work.eval_rows} in evaluation",
            "sampling": "logits of these, and what is made of them",
            "activations": f"{prompts} x {work.prompt_tokens} prompt tokens, {rows} x {work.new_tokens} new ones,"
            f" {self.layers} layers{recomputed}; before sampling: prompts",
            "logits": f"of {choices.logit_chunk or rows * work.new_tokens:,} tokens, {self._vocabulary:,} each",
            "working room": "some gradients in float32"
            if self.has_masters
            else "the layers that are whole at a time"
            if spread
            else "copies to compute with",
        }


def find(
    planner: Planner,
    *,
    free: int,
    rows: int = 0,
    checkpointing: bool | None = None,
    on_host: bool | None = None,
) -> MemoryPlan:
    """The plan that costs the least time of those that fit in `free` bytes; what is given is not chosen.

    Raises CountdownError if none does.
    """
    work = planner.work
    room = int(free * (1 - MARGIN)) - (LIBRARIES if work.device == "cuda" else 0)
    groups = [work.generations * -(-work.prompts // 2**halved) for halved in range(work.prompts.bit_length())]
    parts = [-(-work.generations // 2**halved) for halved in range(1, (work.generations - 1).bit_length() + 1)]
    sizes = [rows] if rows else [0, *dict.fromkeys(size for size in (*groups, *parts) if size < work.rows)]
    shards = work.shards > 1
    hosts = [False] if not work.has_reference or work.device == "cpu" or shards else [False, True]
    options = [
        Choices(logit_chunk, size, recomputed, host)
        for recomputed, host, size, logit_chunk in product(
            [False, True] if checkpointing is None else [checkpointing],
            hosts if on_host is None or shards else [on_host and work.has_reference],
            sizes,
            TILES[:1] if shards else TILES,
        )
        if not logit_chunk or logit_chunk < (size or work.rows) * work.new_tokens
    ]
    for choices in sorted(options, key=planner.cost):
        if planner.fits(choices, room):
            return planner.plan(choices, room=room, reasons=_reasons(planner, choices))
    leanest = min(
        options,
        key=lambda one: (
            one.rows or work.rows,
            not one.checkpointing,
            not one.on_host,
            one.logit_chunk or GB,
        ),
    )
    least = planner.plan(leanest).peak
    raise CountdownError(
        f"this training needs at least {least / GB:.1f} GB of memory, and {room / GB:.1f} GB can be used",
        "take a smaller `--max-new-tokens`, `--batch-size` or model, `--optimizer adamw8bit`, `--precision bf16`, or"
        " more processes with `--shard`;"
        " `--memory` says how many GB to plan for",
    )


def plan_for(name: str, work: Work, settings: Settings, *, free: int = 0) -> MemoryPlan:
    """The plan for a training with these settings: what they leave open is chosen to fit in the memory they give.

    Where they give none it is `free` bytes, or what is free on this device now.

    Raises CountdownError if nothing fits.
    """
    model = settings.model
    return find(
        Planner(name, work),
        free=int(model.memory * GB) or free or free_memory(torch.device(work.device)),
        rows=settings.train.micro_batch_size,
        checkpointing={"auto": None, "on": True, "off": False}[model.gradient_checkpointing],
        on_host={"auto": None, "host": True, "device": False}[model.reference],
    )


def limit(settings: Settings, device: torch.device) -> None:
    """Hold this process to the memory that the settings give, where the device can."""
    if settings.model.memory and device.type == "cuda":
        share = settings.model.memory * GB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def _reasons(planner: Planner, choices: Choices) -> list[str]:
    """Why each choice is not what it would be with more memory."""
    sentences = {
        "logit_chunk": f"logits of {choices.logit_chunk:,} tokens at a time",
        "rows": f"micro-batches of {choices.rows} completions",
        "checkpointing": "gradient checkpointing",
        "on_host": "the reference on the host",
    }
    changed = {name: replace(choices, **{name: getattr(Choices(), name)}) for name in sentences}
    found = [
        f"{sentences[name]}: without, the peak would be {planner.plan(without).peak / GB:.1f} GB"
        for name, without in changed.items()
        if without != choices
    ]
    return found or ["everything at once: it fits"]
