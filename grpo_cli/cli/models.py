"""Load models and join the ranks, for commands that run a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_cli.cli.checks import Chosen
from grpo_cli.cli.launch import place
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import detect_device
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.perf import memory
from grpo_cli.core.rl.observer import Interrupted
from grpo_cli.core.sampling.selfcheck import load_checked
from grpo_cli.core.world import World, join
from grpo_cli.ui import text as show


def load(chosen: Chosen) -> Policy:
    """Load a model for sampling."""
    model = chosen.settings.model
    return load_checked(chosen.source, name=chosen.name, device=model.device, precision=model.precision, note=show.note)


def at_once(settings: Settings, rows: int = 0) -> MicroBatch:
    """At most `rows` completions at once, 0 for all; fewer if memory runs out, on a CPU before it does."""
    on_cpu = detect_device(settings.model.device).type == "cpu"
    return MicroBatch(rows, limit=memory.host_limit(ranks=place().size) if on_cpu else 0, report=show.note)


@contextmanager
def joined(settings: Settings) -> Iterator[World]:
    """The world of the processes that a launcher started, one GPU each; of one process without a launcher.

    A rank that fails raises its error with its name, on the first of them to fail; the others end in silence.
    """
    world = _join(settings)
    if world.size == 1:
        yield world
        return
    try:
        yield world
    except Interrupted:
        raise
    except Exception as error:  # of any kind: it must not be lost among the launcher's own
        show.silence(not world.fails_first())
        sentence = error.message if isinstance(error, CountdownError) else " ".join(str(error).split())
        hint = getattr(error, "hint", "the last checkpoint is intact: continue with `--resume`")
        code = getattr(error, "exit_code", 1)
        name = f"rank {world.rank} of {world.size}"
        raise CountdownError(f"{name}: {sentence or type(error).__name__}", hint, exit_code=code) from error
    world.leave()


def _join(settings: Settings) -> World:
    process = place()
    if process.size == 1:
        return World()
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
