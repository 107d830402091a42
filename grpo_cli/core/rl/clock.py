"""Seconds by phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from grpo_cli.core.dist.ranks import Solo


@dataclass
class Clock:
    """Accumulates `seconds` by metric key: `time/PHASE`."""

    ranks: Solo = field(default_factory=Solo)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block, excluding time spent on other ranks; only `total` includes that."""
        start, spent = time.perf_counter(), self.ranks.spent
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = 0.0 if name == "total" else self.ranks.spent - spent
        self.add({name: time.perf_counter() - start - spent})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by phase."""
        for name, value in seconds.items():
            self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + value
