"""Which of a launcher's processes this is: what torchrun, or SLURM, leaves in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from grpo_cli.core.errors import CountdownError


@dataclass(frozen=True)
class Place:
    """This process among `size`; `local_rank` is its number on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0  # how often the launcher has started all of them again
    max_restarts: int = 0


# What sets the rank, the number of processes and the rank on the machine, under each launcher.
_NAMES = [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")]


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands; alone where no launcher says otherwise.

    A SLURM job counts where it says how to meet, by MASTER_ADDR and MASTER_PORT.
    """
    names = next((names for names in _NAMES if all(name in environ for name in names)), None)
    if names is None or "MASTER_ADDR" not in environ:
        return Place()
    wanted = [*names, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"]
    found = [environ.get(name, "0") for name in wanted]
    bad = [f"{name}={text}" for name, text in zip(wanted, found, strict=True) if not text.isdecimal()]
    if bad:
        raise CountdownError(f"the launcher's environment is not one of whole numbers: {', '.join(bad)}")
    return Place(*map(int, found))
