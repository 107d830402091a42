"""The processes that share a training or an evaluation: each one's part of the work, and how they agree.

The one module that knows torch.distributed. Every rank runs the same code on the same data, and differs in its share
alone; where one fails all of them do, with one message. `Solo` is the one process that there is without a launcher, and
loads nothing. Neither knows what is shared.
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
BUCKET = 25 * 2**20  # bytes of gradients that are added up at once, as in torch's own DistributedDataParallel
ALIGNED = 64  # each gradient of a bucket begins at a multiple of so many numbers, as kernels prefer
ROLL_CALL = 5.0  # seconds in which a rank that is alive says so, once another has gone


class Passing(Exception):
    """Ends the work of all ranks without being a failure, so that messages do not name the rank."""


class Failed(CountdownError):
    """Ranks failed, or no longer answer; `tells` says whether it is this process that says so."""

    def __init__(self, message: str, hint: str | None, *, exit_code: int, tells: bool) -> None:
        super().__init__(message, hint, exit_code=exit_code)
        self.tells = tells


class Gradients:
    """The gradients that passes over a step leave in the weights: those of one process, as they are."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = [weight for weight in weights if weight.requires_grad]

    def begin(self) -> None:
        """Forget what an attempt at the step has left."""
        for weight in self.weights:
            weight.grad = None

    def ending(self) -> None:
        """The backward pass to come is this process's last of the attempt: what it leaves is whole."""

    def completed(self, work: Callable[[], T]) -> T:
        """Run `work`, which makes the passes, and return its result; this process is then done, even on failure."""
        return work()

    def add_up(self) -> list[int]:
        """Put the sum over all ranks in the weights; where a rank has left none it counts as zero.

        Returns the ranks whose gradients were not finite, where there are several.
        """
        return []


class Solo:
    """One process by itself; what several would have to agree on is what it says."""

    rank, size = 0, 1
    of_rank = ""  # what sets this rank apart in messages, where there are several
    doing = "the preparation"  # what all ranks are at, for messages
    spent = 0.0  # seconds spent on other ranks: waiting for them, and adding up gradients

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this rank's. No rank has two more than another; the first has most."""
        return range(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; returns all results in the order of ranks.

        Where it raises on one, all raise: what it raised if that is a `Passing`, else a CountdownError that names it.
        """
        return [work()]

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; returns its result everywhere. Raises as `each` does."""
        return self.each(lambda: work() if self.rank == 0 else cast(T, None))[0]

    def own(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; returns this rank's result. Raises as `each` does."""
        kept: list[T] = []
        self.each(lambda: kept.append(work()))
        return kept[0]

    @contextmanager
    def gradients(self, weights: Iterable[Tensor]) -> Iterator[Gradients]:
        """An object that sums the gradients of `weights` over a step and over ranks."""
        yield Gradients(weights)

    def report(self, seconds: Mapping[str, float], part: list[T]) -> tuple[dict[str, float], list[T]]:
        """Times of the slowest rank in each phase, and the parts of all ranks, in order.

        Of several ranks also the mean seconds of a rank since this was last asked: `time/wait` for the others, and
        `time/reduce` for sums of gradients that its own passes had not hidden.
        """
        return dict(seconds), part

    def named(self, ranks: Sequence[int]) -> str:
        """Name of these ranks in messages."""
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {self.size}"

    def leave(self) -> None:
        """Part from the others."""


class Ranks(Solo):
    """Process `rank` of `size`, connected through `store`."""

    def __init__(self, store: Any, rank: int, size: int, *, device: torch.device, timeout: float) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.of_rank = f" of {self.named([rank])}"
        self._dist, self._store, self._timeout = dist, store, timeout
        self._waited = self._reduced = 0.0
        # Python objects travel by the CPU, so that a rank that fails is known before NCCL waits for it.
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            f"cpu:gloo,cuda:{dist.Backend.NCCL}" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=max(1.0, timeout)),
            # With a device NCCL connects at once: a rank that cannot is known here, not at its first sum.
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_cuda else None,
        )

    def each(self, work: Callable[[], T]) -> list[T]:
        """As `Solo.each`; by one collective."""
        result, problem = cast(T, None), None
        try:
            result = work()
        except Failed:
            raise
        except Exception as error:  # of whatever kind: the others wait for word of it
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
        """One failure stands for all: the lowest rank's, real ones before those that pass."""
        rank = min(failed, key=lambda rank: (isinstance(failed[rank], Passing), rank))
        error = failed[rank]
        if isinstance(error, Passing):
            raise error
        hint = error.hint if isinstance(error, CountdownError) else "the last checkpoint is whole: go on with --resume"
        code = error.exit_code if isinstance(error, CountdownError) else 1
        if len(failed) == self.size and isinstance(error, CountdownError):
            message = error.message  # all of them say so: it is of no rank
        else:
            message = f"{self.named([rank])} failed in {self.doing}: {error}"
        raise Failed(message, hint, exit_code=code, tells=self.rank == 0) from own

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
        """Take part in a collective; a CountdownError that names the ranks that have gone if it fails."""
        try:
            collective()
        except RuntimeError as error:
            present = self._roll_call()
            gone = [rank for rank in range(self.size) if rank not in present]
            if gone:
                message = f"{self.named(gone)} no longer answer{'s' * (len(gone) == 1)} in {self.doing}"
            else:
                message = f"the {self.size} ranks lost each other in {self.doing}: {_sentence(error)}"
            hint = f"the last checkpoint is whole: go on with --resume (a rank may be silent for {self._timeout:g} s)"
            raise Failed(message, hint, exit_code=1, tells=self.rank == min(present)) from error

    def _roll_call(self) -> list[int]:
        """The ranks that say within a few seconds that they are alive."""
        until = time.monotonic() + ROLL_CALL
        present = {self.rank}
        try:
            self._store.set(f"alive/{self.rank}", "yes")
            while len(present) < self.size and time.monotonic() < until:
                present |= {rank for rank in range(self.size) if self._store.check([f"alive/{rank}"])}
                time.sleep(0.1)
        except RuntimeError:
            pass  # whoever kept the store has gone too
        return sorted(present)


class _Summed(Gradients):
    """Gradients that lie in buckets, each added up over the ranks while the last backward pass goes on to others.

    A bucket is sent once it is whole, all ranks in one order. Where memory runs out and a rank makes its passes again,
    those that it has sent stay as they are.
    """

    def __init__(self, ranks: Ranks, weights: Iterable[Tensor]) -> None:
        super().__init__(weights)
        super().begin()  # first, so that the memory of the gradients before is free
        self._ranks, self._sent, self._last = ranks, 0, False
        self._under_way: list[Any] = []
        reached = _buckets(self.weights[::-1])  # by backward passes, in about this order
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
        """Let go of the weights, once nothing is under way."""
        for hook in self._hooks:
            hook.remove()
        with suppress(RuntimeError):  # the ranks have lost each other, which is known by then
            self._wait()


@dataclass
class _Bucket:
    """Weights of one kind, and one tensor with room for their gradients."""

    weights: list[Tensor]
    flat: Tensor
    views: list[Tensor]
    broken: Tensor  # (ranks,) the end of `flat`: whether the gradients of each were not finite
    missing: int = 0  # gradients that the last backward pass has yet to leave

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
    """Meet the other ranks where the environment's MASTER_ADDR and MASTER_PORT say, as torchrun sets them.

    `timeout`: the seconds that a rank may keep the others waiting. `attempt`: how often they have met before, for what
    ranks that are no more have left there is not to be found.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=max(1.0, timeout))))
        store = PrefixStore(f"attempt-{attempt}", store)
        return Ranks(store, rank, size, device=device, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise CountdownError(
            f"rank {rank} of {size} did not find the others: {_sentence(error)}",
            "look at MASTER_ADDR and MASTER_PORT, and whether all processes were started",
            exit_code=1,
        ) from error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one that says the same and can be sent."""
    if isinstance(error, CountdownError):
        return _rebuilt(error.message, error.hint, error.exit_code)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign class raises
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
    """Tensors in lists of one kind, each of at most BUCKET bytes if there are several in it."""
    buckets: list[list[Tensor]] = []
    for tensor in tensors:
        fits = buckets and buckets[-1][0].dtype == tensor.dtype
        if fits and sum(one.nbytes for one in buckets[-1]) + tensor.nbytes <= BUCKET:
            buckets[-1].append(tensor)
        else:
            buckets.append([tensor])
    return buckets
