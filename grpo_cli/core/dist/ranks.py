"""Processes (ranks) that share a training or an evaluation: work shares, collectives and failures.

The only module that uses torch.distributed. All ranks run the same code on the same data; only their share of the work
differs. A failure on one rank stops all of them with one message. `Solo` is the single process without a launcher: it
imports nothing.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from grpo_cli.core.errors import CountdownError

T = TypeVar("T")
BUCKET = 25 * 2**20  # bytes of gradients per all-reduce, as in torch's DistributedDataParallel
ALIGNED = 64  # alignment of gradients in a bucket, in numbers
ROLL_CALL = 5.0  # seconds to wait for answers of live ranks after a failure


class Passing(Exception):
    """Stops every rank without reporting an error."""


class Failed(CountdownError):
    """Ranks failed or no longer answer; `reports` is true on the one rank that prints the message."""

    def __init__(self, message: str, hint: str | None, *, exit_code: int, reports: bool) -> None:
        super().__init__(message, hint, exit_code=exit_code)
        self.reports = reports


class Gradients:
    """Accumulated gradients of a step; in a single process, the gradients as they are."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = [weight for weight in weights if weight.requires_grad]

    def begin(self) -> None:
        """Discard the gradients of an earlier attempt at the step."""
        for weight in self.weights:
            weight.grad = None

    def ending(self) -> None:
        """Mark the next backward pass as the last of this attempt."""

    def completed(self, work: Callable[[], T]) -> T:
        """Run `work`, which makes the passes, and return its result; marks this rank as done even if it raises."""
        return work()

    def add_up(self) -> list[int]:
        """Replace the gradients by their sum over all ranks; a missing gradient counts as zero.

        Returns the ranks whose gradients were not finite, if there are several ranks.
        """
        return []


class Solo:
    """Single process: collectives are no-ops."""

    rank, size = 0, 1
    of_rank = ""  # suffix of messages that names this rank
    doing = "the preparation"  # current work, for messages
    spent = 0.0  # seconds spent on waiting for other ranks and on gradient sums

    def share(self, count: int) -> range:
        """The indices of `count` work items for this rank. Shares differ by at most one, the first is largest."""
        return range(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; returns all results in rank order.

        If it raises on one rank, all raise: the same exception for a `Passing`, else a CountdownError that names the
        rank.
        """
        return [work()]

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only; returns its result on all ranks. Raises as `each` does."""
        return self.each(lambda: work() if self.rank == 0 else cast(T, None))[0]

    def own(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; returns this rank's result. Raises as `each` does."""
        kept: list[T] = []
        self.each(lambda: kept.append(work()))
        return kept[0]

    @contextmanager
    def gradients(self, weights: Iterable[Tensor]) -> Iterator[Gradients]:
        """A context that sums the gradients of `weights` over a step and over ranks."""
        yield Gradients(weights)

    def report(self, seconds: Mapping[str, float], part: list[T]) -> tuple[dict[str, float], list[T]]:
        """The slowest rank's time in each phase, and all ranks' parts in rank order.

        With several ranks, also the mean seconds per rank since the last report: `time/wait` for other ranks, and
        `time/reduce` for gradient sums that no backward pass hid.
        """
        return dict(seconds), part

    def named(self, ranks: Sequence[int]) -> str:
        """These ranks as messages name them."""
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {self.size}"

    def leave(self) -> None:
        """Disconnect from the other ranks."""


class Ranks(Solo):
    """Process `rank` of `size`, connected through `store`."""

    def __init__(self, store: Any, rank: int, size: int, *, device: torch.device, timeout: float) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.of_rank = f" of {self.named([rank])}"
        self._dist, self._store, self._timeout = dist, store, timeout
        self._waited = self._reduced = 0.0
        # Python objects are exchanged by gloo, so a failed rank is noticed before NCCL waits for it.
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            f"cpu:gloo,cuda:{dist.Backend.NCCL}" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=max(1.0, timeout)),
            # With a device, NCCL connects at once, so a connection failure shows up before the first all-reduce.
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_cuda else None,
        )

    def each(self, work: Callable[[], T]) -> list[T]:
        """As `Solo.each`, with one collective."""
        result, problem = cast(T, None), None
        try:
            result = work()
        except Failed:
            raise
        except Exception as error:  # any kind: the other ranks are waiting for the result
            problem = error
        start = time.perf_counter()
        results: list[Any] = [None] * self.size
        self._answered(lambda: self._dist.all_gather_object(results, (result, _portable(problem))))
        self._waited += time.perf_counter() - start
        failed = {rank: error for rank, (_, error) in enumerate(results) if error is not None}
        if failed:
            self._raise(failed, problem)
        return [value for value, _ in results]

    def _raise(self, failed: Mapping[int, Exception], own: Exception | None) -> None:
        """Raise the failure of the lowest rank; real failures come before `Passing`."""
        rank = min(failed, key=lambda rank: (isinstance(failed[rank], Passing), rank))
        error = failed[rank]
        if isinstance(error, Passing):
            raise error
        hint = (
            error.hint if isinstance(error, CountdownError) else "the last checkpoint is intact: continue with --resume"
        )
        code = error.exit_code if isinstance(error, CountdownError) else 1
        if len(failed) == self.size and isinstance(error, CountdownError):
            message = error.message  # raised by all ranks: name none
        else:
            message = f"{self.named([rank])} failed in {self.doing}: {error}"
        raise Failed(message, hint, exit_code=code, reports=self.rank == 0) from own

    @contextmanager
    def gradients(self, weights: Iterable[Tensor]) -> Iterator[Gradients]:
        summed = _Summed(self, weights)
        try:
            yield summed
        finally:
            summed.close()

    @property
    def spent(self) -> float:  # type: ignore[override]
        return self._waited + self._reduced

    def report(self, seconds: Mapping[str, float], part: list[T]) -> tuple[dict[str, float], list[T]]:
        own = {"time/wait": self._waited, "time/reduce": self._reduced}
        everyone = self.each(lambda: (dict(seconds), own, part))
        self._waited = self._reduced = 0.0
        slowest = {name: max(one.get(name, 0.0) for one, _, _ in everyone) for one, _, _ in everyone for name in one}
        means = {name: sum(one[name] for _, one, _ in everyone) / self.size for name in own}
        return slowest | means, [item for _, _, part in everyone for item in part]

    def leave(self) -> None:
        self._dist.destroy_process_group()

    def _answered(self, collective: Callable[[], object]) -> None:
        """Run a collective; if it fails, raise a CountdownError that names the missing ranks."""
        try:
            collective()
        except RuntimeError as error:
            present = self._roll_call()
            gone = [rank for rank in range(self.size) if rank not in present]
            if gone:
                message = f"{self.named(gone)} no longer answer{'s' * (len(gone) == 1)} in {self.doing}"
            else:
                message = f"the {self.size} ranks lost their connection in {self.doing}: {_sentence(error)}"
            hint = (
                f"the last checkpoint is intact: continue with --resume (a rank may be silent for {self._timeout:g} s)"
            )
            raise Failed(message, hint, exit_code=1, reports=self.rank == min(present)) from error

    def _roll_call(self) -> list[int]:
        """The ranks that answer within a few seconds."""
        until = time.monotonic() + ROLL_CALL
        present = {self.rank}
        try:
            self._store.set(f"alive/{self.rank}", "yes")
            while len(present) < self.size and time.monotonic() < until:
                present |= {rank for rank in range(self.size) if self._store.check([f"alive/{rank}"])}
                time.sleep(0.1)
        except RuntimeError:
            pass  # the process with the store is gone too
        return sorted(present)


class _Summed(Gradients):
    """Gradients in buckets, each summed over ranks while the last backward pass continues.

    A bucket is sent once it is complete, in the same order on all ranks. If a rank runs out of memory and repeats its
    passes, buckets that it already sent are kept.
    """

    def __init__(self, ranks: Ranks, weights: Iterable[Tensor]) -> None:
        super().__init__(weights)
        super().begin()  # first, to free the earlier gradients
        self._ranks, self._sent, self._last = ranks, 0, False
        self._under_way: list[Any] = []
        reached = _buckets(self.weights[::-1])  # about the order of a backward pass
        self._buckets = [_Bucket.of(bucket, ranks.size) for bucket in reached]
        self._of = {id(weight): bucket for bucket in self._buckets for weight in bucket.weights}
        self._hooks = [weight.register_post_accumulate_grad_hook(self._left) for weight in self.weights]

    def begin(self) -> None:
        super().begin()
        self._last = False
        for bucket in self._buckets[self._sent :]:
            bucket.missing = len(bucket.weights)
            bucket.flat.zero_()
            bucket.give()

    def ending(self) -> None:
        self._last = True

    def _left(self, weight: Tensor) -> None:
        if self._last:
            self._of[id(weight)].missing -= 1
            while self._sent < len(self._buckets) and self._buckets[self._sent].missing <= 0:
                self._send()

    def _send(self) -> None:
        bucket, ranks = self._buckets[self._sent], self._ranks
        bucket.broken[ranks.rank] = ~bucket.flat.sum().isfinite()
        self._under_way.append(ranks._dist.all_reduce(bucket.flat, async_op=True))
        self._sent += 1

    def completed(self, work: Callable[[], T]) -> T:
        try:
            return work()
        finally:
            while self._sent < len(self._buckets):
                self._send()

    def add_up(self) -> list[int]:
        start = time.perf_counter()
        self._ranks._answered(self._wait)
        for bucket in self._buckets:
            bucket.give()
        broken = torch.stack([bucket.broken.float() for bucket in self._buckets]).amax(dim=0)
        self._ranks._reduced += time.perf_counter() - start
        return broken.nonzero()[:, 0].tolist()

    def _wait(self) -> None:
        while self._under_way:
            self._under_way.pop(0).wait()

    def close(self) -> None:
        """Release the weights after all sums have finished."""
        for hook in self._hooks:
            hook.remove()
        with suppress(RuntimeError):  # ranks are disconnected, which was already reported
            self._wait()


@dataclass
class _Bucket:
    """Weights of one dtype and device, and one tensor for their gradients."""

    weights: list[Tensor]
    flat: Tensor
    views: list[Tensor]
    broken: Tensor  # (ranks,) end of `flat`: 1 if a rank's gradients were not finite
    missing: int = 0  # gradients that the last backward pass has not yet produced

    @classmethod
    def of(cls, weights: list[Tensor], ranks: int) -> _Bucket:
        sizes = [-(-weight.numel() // ALIGNED) * ALIGNED for weight in weights]
        flat = torch.zeros(sum(sizes) + ranks, dtype=weights[0].dtype, device=weights[0].device)
        *parts, broken = flat.split([*sizes, ranks])
        views = [part[: weight.numel()].view_as(weight) for weight, part in zip(weights, parts, strict=True)]
        return cls(weights, flat, views, broken)

    def give(self) -> None:
        for weight, view in zip(self.weights, self.views, strict=True):
            weight.grad = view


def join(rank: int, size: int, *, device: torch.device, timeout: float, attempt: int = 0) -> Ranks:
    """Connect to the other ranks at the environment's MASTER_ADDR and MASTER_PORT, which torchrun sets.

    `timeout`: seconds that a rank may keep the others waiting. `attempt`: number of earlier connections, which keeps
    keys of earlier processes in the store apart.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=max(1.0, timeout))))
        store = PrefixStore(f"attempt-{attempt}", store)
        return Ranks(store, rank, size, device=device, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise CountdownError(
            f"rank {rank} of {size} could not connect to the others: {_sentence(error)}",
            "check MASTER_ADDR and MASTER_PORT, and that all processes have started",
            exit_code=1,
        ) from error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one with the same message that can be pickled."""
    if isinstance(error, CountdownError):
        return _rebuilt(error.message, error.hint, error.exit_code)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # third-party classes may raise anything
        return RuntimeError(_sentence(cast(Exception, error)))
    return error


class _Sent(CountdownError):
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.message, self.hint, self.exit_code)


def _rebuilt(message: str, hint: str | None, exit_code: int) -> CountdownError:
    return _Sent(message, hint, exit_code=exit_code)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split tensors into lists of one dtype and device, each of at most BUCKET bytes unless it is a single tensor."""
    buckets: list[list[Tensor]] = []
    for tensor in tensors:
        fits = buckets and buckets[-1][0].dtype == tensor.dtype
        if fits and sum(one.nbytes for one in buckets[-1]) + tensor.nbytes <= BUCKET:
            buckets[-1].append(tensor)
        else:
            buckets.append([tensor])
    return buckets
