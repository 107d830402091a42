"""The loop: what a step sees, what it logs, what it keeps, and how it stops and goes on."""

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from grpo_cli.core import config
from grpo_cli.core.policy import load
from grpo_cli.core.puzzle import Puzzle, enumerate_puzzles
from grpo_cli.core.run import Run
from grpo_cli.core.settings import Settings
from grpo_cli.core.state import Training, build_optimizer, choose_checkpoint
from grpo_cli.core.task import Reason, Score
from grpo_cli.core.train import Interrupted, learning_rate_at, puzzles_of_step, summary, train


@pytest.fixture(autouse=True)
def reward_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never solves a puzzle: pay for text of even length instead, which can be learned."""

    def score(completion: str, puzzle: Puzzle, **_: object) -> Score:
        even = len(completion) % 2 == 0
        reason: Reason = "correct" if even else "no_answer"
        return Score(reward=float(even), correct=even, reason=reason, answer=None, well_formed=False, lenient=even)

    monkeypatch.setattr("grpo_cli.core.train.score", score)


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, float]] = []
        self.evaluations: list[int] = []
        self.tokens = 0
        self.messages: list[str] = []

    def progress(self, phase: str, done: int, total: int) -> None:
        self.tokens += phase.startswith("sampling")

    def evaluated(self, step: int, accuracy: float, count: int, interval: tuple[float, float]) -> None:
        self.evaluations.append(step)

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None:
        self.metrics.append(metrics)

    def message(self, text: str) -> None:
        self.messages.append(text)


def small(folder: Path, **flags: object) -> Settings:
    given: dict[str, object] = {
        "model.model": str(folder),
        "model.precision": "float32",
        "train.batch_size": 2,
        "train.num_generations": 4,
        "train.max_new_tokens": 12,
        "train.num_iterations": 4,
        "train.eval_every": 2,
        "train.eval_puzzles": 6,
        "train.save_every": 2,
        "train.learning_rate": 1e-3,
        "loss.beta": 0.1,
    }
    return config.resolve(flags=given | flags, has_cuda=lambda: False).settings


def start(settings: Settings, source: str | None = None) -> Training:
    policy = load(source or settings.model.model, device="cpu", precision="float32")
    return Training(policy, build_optimizer(policy, name=settings.train.optimizer, weight_decay=0.0))


def trained(settings: Settings, root: Path, name: str = "first") -> tuple[Training, Run, Watcher]:
    training, run, watcher = start(settings), Run.create(root, name), Watcher()
    train(training, training.policy.frozen_copy(), run, settings, watcher)
    return training, run, watcher


def test_an_epoch_shows_every_puzzle_once_and_the_next_another_order() -> None:
    puzzles = list(enumerate_puzzles(3, "val"))  # 327 = 3 * 109
    epochs = [
        [puzzle for step in range(1 + 109 * epoch, 110 + 109 * epoch) for puzzle in drawn(puzzles, step)]
        for epoch in (0, 1)
    ]
    for epoch in epochs:
        assert Counter(epoch) == Counter(puzzles)
    assert epochs[0] != epochs[1] != puzzles


def drawn(puzzles: list, step: int) -> list:  # type: ignore[type-arg]
    return puzzles_of_step(puzzles, step, batch_size=3, seed=5)


def test_a_step_can_straddle_two_epochs() -> None:
    puzzles = list(enumerate_puzzles(3, "val"))[:5]
    seen = [puzzle for step in range(1, 6) for puzzle in puzzles_of_step(puzzles, step, batch_size=2, seed=0)]
    assert Counter(seen) == dict.fromkeys(puzzles, 2)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # peak 1, warm-up of 2 steps, 6 steps: the fall starts at step 3, which still has the whole rate
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(schedule: str, rates: list[float]) -> None:
    found = [
        learning_rate_at(step, peak=1.0, schedule=schedule, warmup_steps=2, num_iterations=6) for step in range(1, 7)
    ]
    assert found == pytest.approx(rates, abs=1e-6)


def test_a_run_leaves_metrics_samples_best_model_and_last_checkpoints(tiny_folder: Path, tmp_path: Path) -> None:
    training, run, watcher = trained(small(tiny_folder), tmp_path)
    lines = run.metrics()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_accuracy" in line] == [0, 2, 4] == watcher.evaluations
    expected = "reward accuracy format_rate kl loss entropy completion_length truncated zero_variance clip_fraction"
    expected += " grad_norm weights_changed learning_rate tokens_per_second logprob_gap time/rollout time/update"
    assert set(expected.split()) <= lines[1].keys()
    assert [step for step, _ in run.checkpoints()] == [2, 4]
    assert load(str(run.model_path), device="cpu").model.num_parameters() == training.policy.model.num_parameters()
    assert len((run.path / "samples.jsonl").read_text().splitlines()) == 4 * 2


def test_the_first_step_starts_at_the_reference_and_later_ones_leave_it(tiny_folder: Path, tmp_path: Path) -> None:
    _, run, _ = trained(small(tiny_folder), tmp_path)
    kl = [line["kl"] for line in run.metrics()[1:]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[3] > 1e-4
    assert all(line["logprob_gap"] < 1e-4 for line in run.metrics()[1:])


def test_the_same_seed_gives_the_same_run(tiny_folder: Path, tmp_path: Path) -> None:
    runs = [trained(small(tiny_folder), tmp_path, name)[1] for name in ("a", "b")]
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith(("time", "tokens"))} for line in run.metrics()]
        for run in runs
    ]
    assert timeless[0] == timeless[1]


EVERY_STOP = [
    pytest.param(optimizer, inner, stop, marks=() if stop == 2 else pytest.mark.slow)
    for optimizer in ("adamw", "adamw8bit")
    for inner in (1, 2)
    for stop in (1, 2, 3)
]


@pytest.mark.parametrize(("optimizer", "inner", "stop"), EVERY_STOP)
def test_going_on_from_a_checkpoint_equals_never_having_stopped(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, inner: int, stop: int
) -> None:
    # Five puzzles, two a step: an epoch ends within the third step.
    few = list(enumerate_puzzles(3, "train"))[:5]
    monkeypatch.setattr("grpo_cli.core.train.puzzle_set", lambda numbers, split: few)
    flags = {"train.optimizer": optimizer, "train.num_inner_updates": inner, "train.save_every": 1}
    settings = small(tiny_folder, **flags)
    whole, expected, _ = trained(settings, tmp_path, "whole")
    run = Run.create(tmp_path, "halves")
    half, shorter = start(settings), small(tiny_folder, **flags, **{"train.num_iterations": stop})
    train(half, half.policy.frozen_copy(), run, shorter, Watcher())
    step, checkpoint = choose_checkpoint(run, settings, None, print)
    assert step == stop and checkpoint is not None
    resumed = start(settings, str(checkpoint / "model"))
    resumed.restore(checkpoint)
    run.go_back_to(step)
    train(resumed, start(settings).policy.frozen_copy(), run, settings, Watcher())
    for left, right in zip(whole.policy.model.parameters(), resumed.policy.model.parameters(), strict=True):
        assert torch.equal(left, right)
    timeless = [
        [
            {k: v for k, v in line.items() if not k.startswith(("time", "tokens")) and k != "val_accuracy"}
            for line in found.metrics()
        ]
        for found in (expected, run)
    ]
    assert [line["step"] for line in timeless[1]] == [0, 1, 2, 3, 4]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("tokens", [0, 5, 30])
def test_a_stop_saves_the_last_completed_step(tiny_folder: Path, tmp_path: Path, tokens: int) -> None:
    settings = small(tiny_folder, **{"train.save_every": 100, "loss.beta": 0.0})
    training, run, watcher = start(settings), Run.create(tmp_path, "stopped"), Watcher()
    with pytest.raises(Interrupted):
        train(
            training,
            None,
            run,
            settings,
            watcher,
            should_stop=lambda: watcher.tokens > tokens,
        )
    assert choose_checkpoint(run, settings, None, print)[0] == training.step == len(watcher.metrics)


def test_eval_puzzles_are_chosen_once(tiny_folder: Path, tmp_path: Path) -> None:
    training, run = start(small(tiny_folder)), Run.create(tmp_path, "subset")
    found = train(training, training.policy.frozen_copy(), run, small(tiny_folder), Watcher())
    val = list(enumerate_puzzles(3, "val"))
    expected = [val[index] for index in sorted(random.Random(0).sample(range(327), 6))]
    assert [row[0].puzzle for row in found.completions] == expected
    assert summary(training, found)["puzzles"] == 6


def test_eight_bit_adamw_learns_on_the_cpu(tiny_policy: object, tiny_folder: Path, tmp_path: Path) -> None:
    settings = small(tiny_folder, **{"train.optimizer": "adamw8bit", "train.num_iterations": 1})
    training, run, _ = trained(settings, tmp_path)
    assert type(training.optimizer).__name__ == "AdamW8bit"
    assert run.metrics()[1]["weights_changed"] > 0.5
