"""Load models and join the ranks, for commands that run a model."""

from __future__ import annotations

import torch

from grpo_cli.cli.checks import Chosen
from grpo_cli.cli.launch import place
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.dist.ranks import Solo, join
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import detect_device
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.perf import memory
from grpo_cli.core.sampling.selfcheck import load_checked
from grpo_cli.ui import text as show


def load(chosen: Chosen) -> Policy:
    """Load a model for sampling."""
    model = chosen.settings.model
    return load_checked(chosen.source, name=chosen.name, device=model.device, precision=model.precision, note=show.note)


def at_once(settings: Settings, rows: int = 0) -> MicroBatch:
    """At most `rows` completions at once, 0 for all; fewer if memory runs out, on a CPU before it does."""
    on_cpu = detect_device(settings.model.device).type == "cpu"
    return MicroBatch(rows, limit=memory.host_limit(ranks=place().size) if on_cpu else 0, report=show.note)


def join_ranks(settings: Settings) -> Solo:
    """Join the processes that a launcher started, one GPU each; Solo without a launcher."""
    process = place()
    if process.size == 1:
        return Solo()
    device = detect_device(settings.model.device)
    if device.type == "cuda":
        devices = torch.cuda.device_count()
        if process.local_rank >= devices:
            raise CountdownError(
                f"process {process.local_rank} of this machine has no GPU of its own: there are {devices}",
                "start one process per GPU with `--nproc-per-node`",
            )
        torch.cuda.set_device(process.local_rank)
    return join(process.rank, process.size, device=device, timeout=settings.ranks.timeout, attempt=process.restarts)
