"""Seconds by phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from grpo_cli.core.world import World


@dataclass
class Clock:
    """Accumulates seconds by metric key, `time/PHASE`, until the next `lap`."""

    world: World = field(default_factory=World)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block, excluding time spent in collectives; only `total` includes that."""
        start, waited = time.perf_counter(), sum(self.world.seconds.values())
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        waited = 0.0 if name == "total" else sum(self.world.seconds.values()) - waited
        self.add({name: time.perf_counter() - start - waited})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by phase."""
        for name, value in seconds.items():
            self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + value

    def lap(self) -> dict[str, float]:
        """The seconds since the last call, with those in collectives; of each phase, the slowest rank's."""
        own = {**self.seconds, **self.world.lap()}
        self.seconds = {}
        everyone = self.world.gather(own)
        return {name: max(rank.get(name, 0.0) for rank in everyone) for rank in everyone for name in rank}
