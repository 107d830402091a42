"""The processes of a training or an evaluation: rank, share of the work, collectives.

All ranks run the same code on the same data; only their share of the work differs. A rank that fails ends with its
error, its launcher ends the others, and a restart resumes from the last checkpoint. In a single process, collectives
are no-ops and torch.distributed is not imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_cli.core.errors import CountdownError

T = TypeVar("T")


class Disconnected(CountdownError):
    """A collective failed: another rank has ended, or has been silent for too long."""


@dataclass
class World:
    """Process `rank` of `size`; by default the only one. `seconds`: spent in collectives, by kind."""

    rank: int = 0
    size: int = 1
    store: Any = None
    seconds: dict[str, float] = field(default_factory=lambda: {"wait": 0.0, "reduce": 0.0})

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The indices of `count` work items for this rank. Shares differ by at most one, the first is largest."""
        return range(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, a small object that can be pickled, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._collective("wait"):
            torch.distributed.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only; returns its result on all ranks."""
        return self.gather(work() if self.is_first else None)[0]  # type: ignore[return-value]

    def agree(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`; all ranks raise the first CountdownError of any."""
        try:
            value, problem = work(), None
        except CountdownError as error:
            value, problem = None, error
        for first in filter(None, self.gather(problem)):
            raise first
        return value  # type: ignore[return-value]

    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """Replace gradients by their sums over ranks, one all-reduce per dtype; a missing gradient counts as zero."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            by_dtype.setdefault(weight.dtype, []).append(weight.grad)
        with self._collective("reduce"):
            for gradients in by_dtype.values():
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                torch.distributed.all_reduce(flat)
                sums = flat.split([gradient.numel() for gradient in gradients])
                for gradient, total in zip(gradients, sums, strict=True):
                    gradient.copy_(total.view_as(gradient))

    @contextmanager
    def _collective(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            sentence = " ".join(str(error).split()).partition(" (")[0]
            hint = "the last checkpoint is intact: continue with `--resume`"
            raise Disconnected(f"the other ranks no longer answer: {sentence}", hint, exit_code=1) from error
        self.seconds[kind] += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Seconds spent in collectives since the last call, as metrics; none in a single process."""
        spent = {f"time/{kind}": seconds for kind, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return spent if self.size > 1 else {}

    def fails_first(self) -> bool:
        """Whether no other rank has called this before: only that rank reports its error."""
        try:
            return self.store is None or self.store.add("failures", 1) == 1
        except RuntimeError:  # the process with the store is gone
            return True

    def leave(self) -> None:
        """Disconnect from the other ranks."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def join(rank: int, size: int, *, device: torch.device, timeout: float, attempt: int = 0) -> World:
    """Connect to the other ranks at the environment's MASTER_ADDR and MASTER_PORT, which torchrun sets.

    `timeout`: seconds that a rank may keep the others waiting. `attempt`: number of earlier connections, which keeps
    keys of earlier processes in the store apart. Raises CountdownError if the ranks cannot connect.
    """
    from torch.distributed.distributed_c10d import PrefixStore, init_process_group
    from torch.distributed.rendezvous import rendezvous

    limit, on_cuda = timedelta(seconds=max(1.0, timeout)), device.type == "cuda"
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
        store = PrefixStore(f"attempt-{attempt}", store)
        init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",  # objects are gathered on the host
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
            # With a device, NCCL connects at once, so a connection failure shows up before the first all-reduce.
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_cuda else None,
        )
    except (RuntimeError, ValueError) as error:
        raise CountdownError(
            f"rank {rank} of {size} could not connect to the others: {' '.join(str(error).split())}",
            "check MASTER_ADDR and MASTER_PORT, and that all processes have started",
            exit_code=1,
        ) from error
    return World(rank, size, store)
