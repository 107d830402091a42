"""Memory that runs out, or is about to: half as many rows, the same numbers, one sentence."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import Command, default_loss, update
from torch import Tensor

from grpo_cli.core import microbatch
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.microbatch import MicroBatch, ran_out
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl.update import reference_logprobs
from grpo_cli.core.rollout import selfcheck
from grpo_cli.core.rollout.engine import uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.rollout.selfcheck import Outcome

pytestmark = pytest.mark.faults

LOSS = default_loss(loss_type="grpo", beta=0.1, scale_rewards="group")
COMPLETIONS = [[5, 6, 7], [9, 8], [30, 31, 32, 33], [7], [11, 12, 13], [40, 41]]
SEQUENCES = Sequences([[1, 2, 3], [4, 5]], COMPLETIONS, [0, 0, 0, 1, 1, 1])
ADVANTAGE = torch.tensor([1.0, -0.5, 0.25, -1.0, 0.5, 2.0])


def out_of_memory(*_: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_too_little_memory(error: Exception, answer: bool) -> None:
    assert ran_out(error) == answer


def test_an_impossible_allocation_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert ran_out(caught.value)


@pytest.mark.parametrize(
    ("rows", "total", "fits", "tried"),
    [(0, 64, 20, [0, 32, 16]), (0, 7, 1, [0, 4, 2, 1]), (8, 64, 8, [8]), (100, 6, 3, [100, 3])],
)
def test_rows_are_halved_until_they_fit(rows: int, total: int, fits: int, tried: list[int]) -> None:
    seen, told = list[int](), list[str]()
    fit = MicroBatch(rows, report=told.append)
    for _ in range(2):
        for attempt in fit.attempts(total, "update"):
            with attempt:
                seen.append(fit.rows)
                if not 0 < fit.rows <= fits:
                    out_of_memory()
    assert (seen[:-1], fit.rows, len(told)) == (tried, tried[-1], len(tried) - 1)
    assert all("memory ran out in the update" in line for line in told)
    assert seen[-1] == tried[-1]  # what fitted is remembered


def test_one_row_that_does_not_fit_comes_with_advice() -> None:
    with pytest.raises(CountdownError, match="memory ran out in the rollout of a single completion") as caught:
        for attempt in MicroBatch().attempts(5, "rollout"):
            with attempt:
                out_of_memory()
    assert caught.value.hint is not None and "--max-new-tokens" in caught.value.hint
    assert caught.value.exit_code == 1


def test_other_errors_are_not_memorys_fault() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        for attempt in MicroBatch().attempts(5, "update"):
            with attempt:
                raise RuntimeError("shapes")


GIGABYTE = 10**9


def test_a_pass_that_takes_more_than_the_limit_is_repeated_with_half_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a pass takes 10 MB beside 2 GB; before the training, 7 GB were taken once."""
    told, seen, peak = list[str](), list[int](), [7.0]
    monkeypatch.setattr(microbatch, "process_peak", lambda: int(peak[0] * GIGABYTE))
    fit = MicroBatch(8, limit=6 * GIGABYTE, report=told.append)
    for tokens in (40, 61, 70, 140, 300, 600):  # completions grow longer
        for attempt in fit.attempts(8, "update"):
            with attempt, fit.watched(fit.rows):
                peak[0] = max(peak[0], 2 + fit.rows * tokens / 100)
                seen.append(fit.rows)
    assert seen == [8, 8, 8, 4, 4, 4, 2, 2]
    assert told[0] == "memory is nearly full in the update: repeating it with 4 completions at once"


def test_freed_memory_is_given_back_before_rows_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [7]
    monkeypatch.setattr(microbatch, "resident", lambda: held[0] * GIGABYTE)
    monkeypatch.setattr(microbatch, "give_back", lambda: held.__setitem__(0, 2))
    fit = MicroBatch(8, limit=6 * GIGABYTE)
    fit.check()
    assert held == [2]
    monkeypatch.setattr(microbatch, "give_back", lambda: None)
    held[0] = 7
    with pytest.raises(microbatch.NearLimit):
        fit.check()
    MicroBatch(8).check()  # no limit, no check


def test_memory_that_was_freed_is_no_longer_resident() -> None:
    """Blocks of 8 MB, freed in an order that leaves them in the heap of glibc."""
    blocks = [torch.ones(2**21) for _ in range(40)]
    torch.empty(2**23).fill_(1)  # from now on glibc keeps blocks of up to 32 MB
    blocks = [torch.ones(2**21) for _ in range(40)]
    last = torch.ones(2**21)
    held = microbatch.resident()
    assert held > 10**8
    del blocks
    microbatch.give_back()
    assert microbatch.resident() < held - 200_000_000
    assert microbatch.process_peak() > 0.99 * held  # the kernel counts pages of each core in batches
    assert len(last) == 2**21


def test_a_training_near_its_limit_takes_smaller_micro_batches(
    countdown: Command, tiny_folder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--precision", "float32", "--batch-size", "2", "--num-generations", "4", "--max-new-tokens", "8"]
    arguments += ["--num-iterations", "2", "--eval-puzzles", "2", "--device", "cpu"]
    limits = list[int]()
    sound = MicroBatch.watched

    def watched(fit: MicroBatch, rows: int) -> AbstractContextManager[None]:
        limits.append(fit.limit)
        if rows > 2:
            raise microbatch.NearLimit
        return sound(fit, rows)

    monkeypatch.setattr(MicroBatch, "watched", watched)
    found = countdown("train", "--model", tiny_folder, "--run", "near", *arguments, "--memory", "5")
    assert found.code == 0
    assert "memory is nearly full in the reference pass: repeating it with 4 completions at once" in found.err
    assert "with 2 completions at once" in found.err
    assert set(limits) == {5 * GIGABYTE}


def test_an_evaluation_without_free_memory_ends_in_one_sentence(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_cli.core.perf.memory.free_memory", lambda device: -(10**12))
    found = countdown("eval", tiny_folder, "--limit", 4, "--device", "cpu")
    assert found.code == 1
    assert "memory is nearly full in the rollout: repeating it with 2 completions at once" in found.err
    assert "memory is nearly full in the rollout of a single completion" in found.err


def limited(monkeypatch: pytest.MonkeyPatch, rows: int, *, backward: bool = False) -> None:
    """Log-probabilities of more than `rows` completions run out of memory, forward or backward."""
    logprobs = Policy.logprobs

    def wrapped(policy: Policy, sequences: Sequences, **options: Any) -> tuple[Tensor, Tensor]:
        too_many = len(sequences.completions) > rows and policy.device.type != "meta"  # where memory is planned
        if too_many and not backward:
            out_of_memory()
        found, entropy = logprobs(policy, sequences, **options)
        if too_many:
            found.register_hook(out_of_memory)
        return found, entropy

    monkeypatch.setattr(Policy, "logprobs", wrapped)


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given, and does what SGD does."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model.parameters(), lr=0.1)
        self.gradients: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        self.gradients.append([parameter.grad.clone() for parameter in group["params"]])
        super().step()


def learn(policy: Policy, fit: MicroBatch) -> list[list[Tensor]]:
    """Two inner updates; the gradient of each."""
    recorder = Recorder(policy)
    update(
        policy,
        recorder,
        SEQUENCES,
        ADVANTAGE,
        loss=LOSS,
        temperature=1.0,
        max_new_tokens=4,
        num_inner_updates=2,
        micro_batch=fit,
        ref_logprobs=torch.full((6, 4), -3.0),
    )
    return recorder.gradients


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_the_gradient_is_the_same_when_memory_runs_out(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, rows: int, backward: bool
) -> None:
    untouched = Reference.of(tiny_policy).policy
    untouched.model.requires_grad_(True)
    expected = learn(untouched, MicroBatch())
    limited(monkeypatch, rows, backward=backward)
    told: list[str] = []
    found = learn(tiny_policy, MicroBatch(report=told.append))
    assert told and f"repeating it with {min(rows, 3)} completion" in told[-1]
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_reference_pass_is_the_same_when_memory_runs_out(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference_logprobs(Reference(tiny_policy), SEQUENCES, temperature=1.0)
    limited(monkeypatch, 2)
    fit = MicroBatch()
    torch.testing.assert_close(
        reference_logprobs(Reference(tiny_policy), SEQUENCES, temperature=1.0, micro_batch=fit), expected
    )
    assert fit.rows == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_the_same_is_sampled_when_memory_runs_out(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    prompts, uniform = [[1, 2, 3], [4, 5], [6]], uniforms(0, 1, range(3), 4, 6)

    def go(fit: MicroBatch | None) -> tuple[list[list[int]], list[bool]]:
        found = LocalEngine(tiny_policy).sample(
            prompts, SamplingParams(6, num_generations=4), uniform=uniform, micro_batch=fit
        )
        return found.completions, found.truncated

    expected = go(None)
    step = PackedPath.step

    def limited_step(path: PackedPath, policy: Policy, longest: int) -> Callable[..., Tensor]:
        one = step(path, policy, longest)
        return lambda tokens, *rest: one(tokens, *rest) if len(tokens) <= rows else out_of_memory()

    monkeypatch.setattr(PackedPath, "step", limited_step)
    fit = MicroBatch()
    assert go(fit) == expected
    assert 1 <= fit.rows <= 6
    assert go(MicroBatch(rows)) == expected


def test_a_training_goes_on_with_fewer_rows_and_says_so(
    countdown: Command, tiny_folder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--precision", "float32", "--batch-size", "2", "--num-generations", "2", "--max-new-tokens", "8"]
    arguments += ["--num-iterations", "1", "--eval-puzzles", "2"]
    passed = Outcome("packed", 0.0)
    monkeypatch.setattr(selfcheck, "checked", lambda policy, **_: (policy, passed))  # it would run out of memory too
    limited(monkeypatch, 1)
    found = countdown("train", "--model", tiny_folder, "--run", "small", *arguments)
    assert found.code == 0
    assert "memory ran out in the reference pass: repeating it with 2 completions at once" in found.err
    assert "with 1 completion at once" in found.err
    limited(monkeypatch, 0)
    found = countdown("train", "--model", tiny_folder, "--run", "smaller", *arguments)
    assert found.code == 1
    assert "memory ran out in the reference pass of a single completion" in found.err and "hint:" in found.err
