"""The loop: what a step sees, what it logs, what it keeps, and how it stops and goes on."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SetPuzzles, state_of, timeless, train

from grpo_cli.core.config import resolve as config
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.evaluate import Evaluation, Evaluator
from grpo_cli.core.metrics import METRICS, metric
from grpo_cli.core.model.load import load
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.reference import Reference
from grpo_cli.core.rl import grpo
from grpo_cli.core.rl import update as update_module
from grpo_cli.core.rl.build import assemble
from grpo_cli.core.rl.clock import Clock
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.observer import Observer, Validated
from grpo_cli.core.rl.schedule import scheduled_rate
from grpo_cli.core.rl.state import State, choose_checkpoint
from grpo_cli.core.rl.summary import summary
from grpo_cli.core.rl.validate import Validation
from grpo_cli.core.rollout.engine import Rollout
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task import countdown, scoring
from grpo_cli.core.task.countdown import Countdown, PuzzlePaths
from grpo_cli.core.task.curriculum import problems_of_step
from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.rules import Rules
from grpo_cli.core.task.scoring import Cheat, Reason, Score
from grpo_cli.core.task.task import Message, Problem


@pytest.fixture(scope="module", autouse=True)
def reward_by_length() -> Iterator[None]:
    """A random model never solves a puzzle: pay for text of even length instead, which can be learned."""

    def score(completion: str, puzzle: Puzzle, **_: object) -> Score:
        even = len(completion) % 2 == 0
        reason: Reason = "correct" if even else "no_answer"
        return Score(reward=float(even), correct=even, reason=reason, answer=None, well_formed=False, lenient=even)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(countdown, "score", score)
        yield


class Watcher(Observer):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, float]] = []
        self.evaluations: list[int] = []
        self.tokens = 0
        self.messages: list[str] = []

    def progress(self, phase: str, done: int, total: int) -> None:
        self.tokens += phase.startswith("sampling")

    def evaluated(self, result: Validated) -> None:
        self.evaluations.append(result.step)

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None:
        self.metrics.append(metrics)

    def message(self, text: str) -> None:
        self.messages.append(text)


def small(folder: Path, **flags: object) -> Settings:
    given: dict[str, object] = {
        "model.model": str(folder), "model.precision": "float32", "train.batch_size": 2, "train.num_generations": 4,
        "train.max_new_tokens": 12, "train.num_iterations": 4, "train.eval_every": 2, "train.eval_puzzles": 6,
        "train.save_every": 2, "train.learning_rate": 1e-3, "loss.beta": 0.1,
    }  # fmt: skip
    return config.resolve(flags=given | flags, has_cuda=lambda: False).settings


def start(settings: Settings, source: str | None = None) -> State:
    policy = load(source or settings.model.model, device="cpu", precision="float32")
    return state_of(policy, optimizer=settings.train.optimizer)


def trained(settings: Settings, root: Path, name: str = "first") -> tuple[State, Run, Watcher]:
    training, run, watcher = start(settings), Run.create(root, name), Watcher()
    train(training, Reference.of(training.policy), run, settings, watcher)
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
    return list(problems_of_step(puzzles, step, batch_size=3, seed=5))


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
    flags = {"learning_rate": 1.0, "schedule": schedule, "warmup_steps": 2, "num_iterations": 6}
    settings = config.resolve(flags={f"train.{key}": value for key, value in flags.items()}, has_cuda=lambda: False)
    found = [scheduled_rate(settings.settings.train, step) for step in range(1, 7)]
    assert found == pytest.approx(rates, abs=1e-6)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Run, Watcher, Evaluation]:
    """A training by the settings of `small`, and its last evaluation."""
    training, run, watcher = start(small(tiny_folder)), Run.create(tmp_path_factory.mktemp("plain"), "first"), Watcher()
    found = train(training, Reference.of(training.policy), run, small(tiny_folder), watcher)
    return training, run, watcher, found


def test_a_run_leaves_metrics_samples_best_model_and_last_checkpoints(
    plain: tuple[State, Run, Watcher, Evaluation],
) -> None:
    training, run, watcher, _ = plain
    lines = run.metrics()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_accuracy" in line] == [0, 2, 4] == watcher.evaluations
    expected = "reward accuracy format_rate kl loss entropy completion_length truncated zero_variance clip_fraction"
    expected += " grad_norm weights_changed learning_rate tokens_per_second logprob_gap time/rollout time/update"
    expected += " time/prefill time/decode time/score time/reference time/optimizer padding peak_memory mfu"
    assert set(expected.split()) <= lines[1].keys()
    for line in lines[1:]:
        assert line["time/prefill"] + line["time/decode"] <= line["time/rollout"]
        parts = ("rollout", "score", "reference", "update", "optimizer")
        assert sum(line[f"time/{part}"] for part in parts) <= line["time/total"]
    for line in lines[1:]:
        assert 0 <= line["padding"] < 1
        assert line["mfu"] > 0
        assert 0.05 < line["peak_memory"] < 100  # GB of this process
    assert [step for step, _ in run.checkpoints()] == [2, 4]
    assert load(str(run.model_path), device="cpu").model.num_parameters() == training.policy.model.num_parameters()
    assert len((run.path / "samples.jsonl").read_text().splitlines()) == 4 * 2


def test_the_first_step_starts_at_the_reference_and_later_ones_leave_it(
    plain: tuple[State, Run, Watcher, Evaluation],
) -> None:
    run = plain[1]
    kl = [line["kl"] for line in run.metrics()[1:]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[3] > 1e-4
    (gap,) = [line["logprob_gap"] for line in run.metrics() if "logprob_gap" in line]  # once in COMPARE_EVERY steps
    assert gap < 1e-4


EVERY_STOP = [
    pytest.param(
        optimizer, inner, stop, marks=() if (optimizer, inner, stop) == ("adamw8bit", 2, 2) else pytest.mark.slow
    )
    for optimizer in ("adamw", "adamw8bit")
    for inner in (1, 2)
    for stop in (1, 2, 3)
]


@pytest.mark.faults
@pytest.mark.parametrize(("optimizer", "inner", "stop"), EVERY_STOP)
def test_going_on_from_a_checkpoint_equals_never_having_stopped(
    tiny_folder: Path, tmp_path: Path, set_puzzles: SetPuzzles, optimizer: str, inner: int, stop: int
) -> None:
    # Six puzzles, one of them dev, two a step: an epoch ends within the third step.
    few = {"train": list(enumerate_puzzles(3, "train"))[:6], "val": list(enumerate_puzzles(3, "val"))}
    set_puzzles(lambda _, side, *__: few[side])
    flags = {"train.optimizer": optimizer, "train.num_inner_updates": inner, "train.save_every": 1}
    settings = small(tiny_folder, **flags)
    whole, expected, _ = trained(settings, tmp_path, "whole")
    run = Run.create(tmp_path, "halves")
    half, shorter = start(settings), small(tiny_folder, **flags, **{"train.num_iterations": stop})
    train(half, Reference.of(half.policy), run, shorter, Watcher())
    step, checkpoint = choose_checkpoint(run, settings, None, print)
    assert step == stop and checkpoint is not None
    resumed = start(settings, str(checkpoint / "model"))
    resumed.restore(checkpoint)
    run.go_back_to(step)
    train(resumed, Reference.of(start(settings).policy), run, settings, Watcher())
    for left, right in zip(whole.policy.model.parameters(), resumed.policy.model.parameters(), strict=True):
        assert torch.equal(left, right)
    lines = [[{**line, "val_accuracy": 0, "dev_accuracy": 0} for line in timeless(found)] for found in (expected, run)]
    assert [line["step"] for line in lines[1]] == [0, 1, 2, 3, 4]
    assert lines[0] == lines[1]


# Numbers that are not finite, and batches that teach nothing


def is_trained_on(puzzle: Puzzle) -> bool:
    """Whether a puzzle is in the train split, not in dev or val."""
    return puzzle in Countdown().problems("train", 3)


def spoil(monkeypatch: pytest.MonkeyPatch, what: str, value: float, bad: set[int]) -> None:
    """In the steps `bad`, one reward of the eight, the loss, or its gradient is `value`, or multiplied by it."""
    calls = count(8 if what == "reward" else 1)
    scored, added = vars(countdown)["score"], grpo.batch_loss

    def score(completion: str, puzzle: Puzzle, **options: Any) -> Score:
        result: Score = scored(completion, puzzle, **options)
        if not is_trained_on(puzzle):
            return result
        call = next(calls)
        return replace(result, reward=value) if call % 8 == 0 and call // 8 in bad else result

    def batch_loss(*arguments: Any) -> Any:
        total, *others = added(*arguments)
        if next(calls) in bad:
            if what == "loss":
                total = total * value
            else:
                total.register_hook(lambda gradient: gradient * value)
        return total, *others

    if what == "reward":
        monkeypatch.setattr(countdown, "score", score)
    else:
        monkeypatch.setattr(update_module, "batch_loss", batch_loss)


@pytest.mark.faults
@pytest.mark.parametrize(("what", "value"), [("reward", math.nan), ("loss", math.inf), ("gradient", -math.inf)])
def test_a_step_that_is_not_finite_is_skipped_counted_and_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: float
) -> None:
    weights: list[list[torch.Tensor]] = []

    class Weigher(Watcher):
        def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None:
            super().step(metrics, sample)
            weights.append([parameter.detach().clone() for parameter in training.policy.model.parameters()])

    spoil(monkeypatch, what, value, {2})
    settings = small(tiny_folder)
    training, run, watcher = start(settings), Run.create(tmp_path, "first"), Weigher()
    found = train(training, Reference.of(training.policy), run, settings, watcher)
    assert all(map(torch.equal, weights[0], weights[1]))
    for one, other in ((1, 2), (2, 3)):
        assert not all(map(torch.equal, weights[one], weights[other]))
    assert all(bool(torch.isfinite(weight).all()) for weight in weights[3])
    assert [line["bad_steps"] for line in run.metrics()[1:]] == [0, 1, 1, 1]
    assert summary(training.progress, found, run)["bad_steps"] == 1
    (message,) = watcher.messages
    assert message.startswith("step 2: the ") and "not finite" in message
    report = json.loads((run.path / "bad_steps" / "step-2.json").read_text())
    assert (report["step"], len(report["prompts"]), len(report["completions"])) == (2, 2, 8)
    assert {"completion", "tokens", "reward", "numbers", "target"} <= report["completions"][0].keys()


@pytest.mark.faults
def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_last_good_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "loss", math.nan, {2, 4, 5})
    settings = small(tiny_folder, **{"train.num_iterations": 9, "train.max_bad_steps": 2, "train.save_every": 100})
    training, run = start(settings), Run.create(tmp_path, "first")
    with pytest.raises(CountdownError, match="the loss is not finite in 2 steps in a row") as caught:
        train(training, Reference.of(training.policy), run, settings, Watcher())
    good = run.checkpoint_path(4) / "model"
    assert caught.value.exit_code == 1
    assert str(good) in caught.value.message and str(good) in (caught.value.hint or "")
    assert all(bool(torch.isfinite(weight).all()) for weight in load(str(good), device="cpu").model.parameters())
    assert training.progress.bad_steps == 3
    assert sorted(path.name for path in (run.path / "bad_steps").iterdir()) == [
        "step-2.json",
        "step-4.json",
        "step-5.json",
    ]


@pytest.mark.faults
@pytest.mark.parametrize(("beta", "scale"), [(0.0, "group"), (0.1, "batch")])
def test_rewards_that_are_all_equal_leave_finite_metrics_and_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float, scale: str
) -> None:
    same = Score(reward=0.2, correct=False, reason="no_answer", answer=None, well_formed=True, lenient=False)
    monkeypatch.setattr(countdown, "score", lambda *_, **__: same)
    flags = {"loss.beta": beta, "loss.scale_rewards": scale, "train.num_iterations": 2}
    training, run, watcher = trained(small(tiny_folder, **flags), tmp_path)
    assert training.progress.bad_steps == 0 and not watcher.messages
    assert all(line["zero_variance"] == 1 and line["reward"] == pytest.approx(0.2) for line in run.metrics()[1:])
    moved = [line["weights_changed"] for line in run.metrics()[1:]]
    assert moved == [0, 0] if beta == 0 else all(bool(torch.isfinite(w).all()) for w in weights_of(training))


def weights_of(training: State) -> list[torch.Tensor]:
    return list(training.policy.model.parameters())


@pytest.mark.faults
def test_a_run_whose_completions_are_all_truncated_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    _, run, _ = trained(small(tiny_folder, **{"train.max_new_tokens": 1, "train.num_iterations": 2}), tmp_path)
    assert [line["truncated"] for line in run.metrics()[1:]] == [1, 1]
    assert all(math.isfinite(value) for line in run.metrics() for value in line.values())


@pytest.mark.faults
@pytest.mark.parametrize("stop", [False, True])
def test_a_collapse_is_warned_of_once_and_ends_the_run_if_asked_to(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: bool
) -> None:
    monkeypatch.setattr("grpo_cli.core.rl.health.WINDOW", 2)
    hollow = Score(reward=0.2, correct=False, reason="wrong_value", answer="1", well_formed=True, lenient=False)
    monkeypatch.setattr(countdown, "score", lambda *_, **__: hollow)
    settings = small(tiny_folder, **{"train.stop_on_collapse": stop})
    training, run, watcher = start(settings), Run.create(tmp_path, "first"), Watcher()
    if not stop:
        train(training, Reference.of(training.policy), run, settings, watcher)
        collapse, health = watcher.messages
        assert collapse.startswith("warning: in 2 steps every completion was well formed and none was correct")
        assert health.startswith("warning: 100% of the completions reach the token limit")
        return
    with pytest.raises(CountdownError, match="step 2: in 2 steps every completion was well formed") as caught:
        train(training, Reference.of(training.policy), run, settings, watcher)
    assert caught.value.exit_code == 1 and "--no-stop-on-collapse" in (caught.value.hint or "")
    assert choose_checkpoint(run, settings, None, print)[0] == 2


def test_what_completions_were_like_is_logged_with_their_attempts_to_cheat(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: cycle[Cheat | None] = cycle(["numbers", None, "no_thought", "numbers"])  # of every group of four
    wrong = Score(reward=0.2, correct=False, reason="wrong_numbers", answer="1", well_formed=True, lenient=True)
    monkeypatch.setattr(countdown, "score", lambda *_, **__: replace(wrong, cheat=next(kinds)))
    _, run, _ = trained(small(tiny_folder, **{"train.num_iterations": 2}), tmp_path)
    for line in run.metrics()[1:]:
        assert (line["accuracy"], line["lenient_accuracy"]) == (0.0, 1.0)
        assert (line["cheat/numbers"], line["cheat/no_thought"], line["cheat/not_arithmetic"]) == (0.5, 0.25, 0.0)


# Curricula, groups sampled anew, suites, and when to stop

UNUSED = {"reward/", "prompts/", "refilled"}  # of rewards in parts, mixed prompts, dynamic sampling
SUITE = {"val 3 one-shot": 1.0, "val 4 natural": 3.0, "train 3 zero-shot": 0.0}


def with_suite(folder: Path, **flags: object) -> Settings:
    settings = small(folder, **{"train.eval_suite": "transfer", **flags})
    return settings.model_copy(update={"suite": {"transfer": SUITE}})


@pytest.mark.parametrize("stop", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_curriculum_shows_in_the_metrics_and_goes_on_as_if_it_had_not_stopped(
    tiny_folder: Path, tmp_path: Path, stop: int
) -> None:
    flags: dict[str, object] = {
        "train.prompt_style": "one-shot -> zero-shot, linear over 3 steps",
        "train.prompt_numbers": "3 = 0.5, 4 = 0.5", "train.dynamic_sampling": 2, "train.save_every": 1,
        "train.batch_size": 4, "train.eval_every": 1, "train.eval_puzzles": 2,
    }  # fmt: skip
    settings = with_suite(tiny_folder, **flags)
    whole, expected, _ = trained(settings, tmp_path, "whole")
    styles = [line["prompts/zero-shot"] for line in expected.metrics()[1:]]
    assert styles[0] == 0 and styles[3] == 1
    assert all(line["prompts/one-shot"] == 1 - line["prompts/zero-shot"] for line in expected.metrics()[1:])
    assert len({line["prompts/4 numbers"] for line in expected.metrics()[1:]}) > 1
    run, half = Run.create(tmp_path, "halves"), start(settings)
    train(half, Reference.of(half.policy), run, with_suite(tiny_folder, **flags, **{"train.num_iterations": stop}),
          Watcher())  # fmt: skip
    checkpoint = run.checkpoint_path(stop)
    resumed = start(settings, str(checkpoint / "model"))
    resumed.restore(checkpoint)
    run.go_back_to(stop)
    train(resumed, Reference.of(start(settings).policy), run, settings, Watcher())
    assert timeless(run) == timeless(expected)
    assert run.evaluations() == expected.evaluations()
    assert resumed.progress.best_step == whole.progress.best_step and resumed.progress.waited == whole.progress.waited
    assert all(map(torch.equal, weights_of(whole), weights_of(resumed)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Puzzle]:
    """The puzzles of the prompts that are trained on."""
    puzzles: list[Puzzle] = []

    def remembering(puzzle: Puzzle, style: Style, rules: Rules) -> list[Message]:
        if is_trained_on(puzzle):
            puzzles.append(puzzle)
        return prompt(puzzle, style, rules)

    monkeypatch.setattr(countdown, "prompt", remembering)
    return puzzles


def test_groups_of_equal_rewards_are_sampled_anew_from_other_puzzles(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Puzzle]
) -> None:
    plain = Countdown().problems("train", 3)
    drawn = [set(problems_of_step(plain, step, batch_size=2, seed=0)) for step in range(1, 5)]
    hopeless = drawn[0] | drawn[2]  # nobody is paid for the puzzles of steps 1 and 3
    shared = iter(range(10**6))

    def score(completion: str, puzzle: Puzzle, **_: object) -> Score:
        right = puzzle not in hopeless and next(shared) % 2 == 0
        return Score(float(right), right, "correct" if right else "no_answer", None, False, right)

    monkeypatch.setattr(countdown, "score", score)
    _, run, _ = trained(small(tiny_folder, **{"train.dynamic_sampling": 3, "train.eval_every": 100}), tmp_path)
    lines = run.metrics()[1:]
    assert [line["zero_variance"] for line in lines] == [1, 0, 1, 0]  # of what was drawn first
    assert [line["reward"] for line in lines] == [0, 0.5, 0, 0.5]
    assert [line["refilled"] for line in lines] == [1, 0, 1, 0]
    assert lines[0]["loss"] != 0 or lines[0]["grad_norm"] > 0
    assert len(asked) == 2 * (4 + 2)
    records = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    kept = {(line["step"], tuple(line["numbers"]), line["target"]) for line in records}
    assert {(2, *question(puzzle)) for puzzle in drawn[1]} <= kept  # the order of the others is as ever
    assert not {(1, *question(puzzle)) for puzzle in drawn[0]} & kept


def test_sampling_anew_is_bounded_and_leaves_what_cannot_be_helped(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Puzzle]
) -> None:
    same = Score(reward=0.2, correct=False, reason="no_answer", answer=None, well_formed=True, lenient=False)
    monkeypatch.setattr(countdown, "score", lambda *_, **__: same)
    _, run, _ = trained(small(tiny_folder, **{"train.dynamic_sampling": 3, "train.eval_every": 100}), tmp_path)
    assert len(asked) == 4 * 2 * (1 + 3)
    assert len(set(asked)) > 4 * 2 * 3  # nearly always others
    assert [line["refilled"] for line in run.metrics()[1:]] == [0, 0, 0, 0]


def test_a_suite_is_evaluated_cell_by_cell_whatever_the_training_is_shown(tiny_folder: Path, tmp_path: Path) -> None:
    flags = {"train.prompt_style": "natural", "train.prompt_numbers": "4", "train.eval_samples": 2}
    settings = with_suite(tiny_folder, **flags)
    training, run, _ = trained(settings, tmp_path)
    assert {metric(name).name for line in run.metrics() for name in line} == {one.name for one in METRICS} - UNUSED
    found = run.evaluations()
    dev = ["dev 3 one-shot", "dev 4 natural"]  # of the cells that have a weight
    assert set(found) == {*SUITE, *dev} and all(list(history) == [0, 2, 4] for history in found.values())
    assert all(one.count == 6 == len(one.solved) for history in found.values() for one in history.values())
    for line in run.metrics():
        if line["step"] in (0, 2, 4):
            values = {name: found[name][int(line["step"])].accuracy for name in SUITE}
            assert {name: line[f"suite/{name}"] for name in SUITE} == values
            assert line["suite_mean"] == pytest.approx((values["val 3 one-shot"] + 3 * values["val 4 natural"]) / 4)
            assert line["val_accuracy"] == values["val 3 one-shot"]
            on_dev = [found[name][int(line["step"])].accuracy for name in dev]
            assert line["dev_accuracy"] == pytest.approx((on_dev[0] + 3 * on_dev[1]) / 4)
            assert line["time/suite"] <= line["time/eval"]
        else:
            assert not [key for key in line if key.startswith("suite")]
    outcome = summary(training.progress, train_again(training, run, settings), run)
    assert outcome["peaks"]["val 4 natural"]["start"] == found["val 4 natural"][0].accuracy  # type: ignore[index]


def test_a_cell_of_a_suite_has_the_puzzles_of_a_file_that_are_of_its_size(tmp_path: Path) -> None:
    files_of = {
        "train": {(1, 2, 3): 6, (1, 2, 3, 4): 10},
        "dev": {(1, 2, 5): 8, (1, 2, 3, 5): 11},
        "val": {(2, 4, 6): 12, (2, 2, 4, 6): 14, (2, 4, 8): 14},
    }
    for name, puzzles in files_of.items():
        lines = [json.dumps({"numbers": numbers, "target": target}) for numbers, target in puzzles.items()]
        (tmp_path / name).write_text("\n".join(lines))
    files = Countdown(paths=PuzzlePaths(*(tmp_path / name for name in files_of)))
    evaluator: Any = SimpleNamespace(task=files)

    def asked(**suite: float) -> Mapping[str, int]:
        settings = small(tmp_path).model_copy(update={"suite": {"none": suite}})
        validation = Validation(evaluator, settings, Clock(), Context())
        return {one.name: len(puzzles) for one, puzzles in validation.puzzles.items()}

    assert asked() == {"val one-shot": 3, "dev one-shot": 2}
    dev = {"dev 3 one-shot": 1, "dev 4 natural": 1}
    assert asked(**SUITE) == {"val one-shot": 3, **dev, "val 3 one-shot": 2, "val 4 natural": 1, "train 3 zero-shot": 1}
    with pytest.raises(CountdownError, match="no puzzles for the cell `dev 5 one-shot`"):
        asked(**{"val 5 one-shot": 1.0})


def train_again(training: State, run: Run, settings: Settings) -> Any:
    """The last evaluation of a training that has ended."""
    return train(training, Reference.of(training.policy), run, settings, Watcher())


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Evaluations that solve what stands here: for each cell, a text for each evaluation, a character a puzzle."""
    script: dict[str, list[str]] = {}
    evaluate_cells = Evaluator.evaluate_cells

    def solved_as_scripted(result: Evaluation) -> Evaluation:
        if result.cell not in script:
            return result
        rows = [
            [replace(one, score=replace(one.score, correct=mark == "1")) for one in row]
            for row, mark in zip(result.completions, script[result.cell].pop(0), strict=True)
        ]
        return replace(result, completions=rows)

    def scripted(evaluator: Evaluator, puzzles: Any, **given: Any) -> Any:
        results = evaluate_cells(evaluator, puzzles, **given)
        return {cell: solved_as_scripted(result) for cell, result in results.items()}

    monkeypatch.setattr(Evaluator, "evaluate_cells", scripted)
    return script


def test_the_best_model_is_that_of_the_suite_on_dev_and_the_summary_says_what_going_on_cost(
    tiny_folder: Path, tmp_path: Path, scripted: dict[str, list[str]]
) -> None:
    scripted |= {
        "val 3 one-shot": ["000000", "110000", "111000", "111111", "111110"],
        "val 4 natural": ["000000", "111111", "111111", "000000", "000000"],
        "train 3 zero-shot": ["111111"] * 5,
    }
    scripted |= {f"dev {cell[4:]}": list(scripted[cell]) for cell in ("val 3 one-shot", "val 4 natural")}
    settings = with_suite(tiny_folder, **{"train.eval_every": 1})
    training, run, watcher = start(settings), Run.create(tmp_path, "first"), Watcher()
    found = train(training, Reference.of(training.policy), run, settings, watcher)
    assert (training.progress.best_step, training.progress.waited) == (2, 2)
    assert training.progress.best_score == pytest.approx((3 / 6 + 3 * 1) / 4) and training.progress.best_accuracy == 0.5
    outcome: Any = summary(training.progress, found, run)
    assert (outcome["best_step"], outcome["steps"]) == (2, 4)
    one, other = outcome["peaks"]["val 3 one-shot"], outcome["peaks"]["val 4 natural"]
    assert (one["step"], one["accuracy"], one["kept"], one["last"]) == (3, 1.0, 0.5, pytest.approx(5 / 6))
    assert (one["gained"], one["lost"], one["p_value"]) == (3, 0, 0.25)  # from the start to the best step
    assert (other["step"], other["kept"], other["last"], other["gained"]) == (1, 1.0, 0.0, 6)
    assert other["p_value"] == 2 * 0.5**6
    assert outcome["peaks"]["dev 4 natural"]["p_value"] is None  # chose the best step
    times = {line["step"]: line["time/total"] for line in run.metrics()[1:]}
    evaluations = sum(line["time/eval"] for line in run.metrics() if line["step"] > 2)
    assert outcome["seconds_after_best"] == pytest.approx(times[3] + times[4] + evaluations)


@pytest.mark.parametrize(("patience", "steps"), [(2, 3), (0, 6)])
def test_patience_counts_evaluations_without_a_better_one(
    tiny_folder: Path, tmp_path: Path, scripted: dict[str, list[str]], patience: int, steps: int
) -> None:
    scripted["dev 3 one-shot"] = ["000000", "110000", "110000", "100000", "111000", "000000", "000000"]
    scripted["val 3 one-shot"] = ["000000", "100000", *["111111"] * 5]  # is reported and chooses nothing
    settings = small(
        tiny_folder,
        **{"train.eval_every": 1, "train.num_iterations": 6, "train.patience": patience, "train.save_every": 100},
    )
    training, run, watcher = start(settings), Run.create(tmp_path, "first"), Watcher()
    train(training, Reference.of(training.policy), run, settings, watcher)
    assert training.progress.step == steps == run.metrics()[-1]["step"]
    assert run.checkpoints()[-1][0] == steps
    assert (len(watcher.messages) == 1) == (steps < 6)
    best_step, val = (1, 1 / 6) if steps < 6 else (4, 1.0)
    assert (training.progress.best_step, training.progress.best_accuracy) == (best_step, val)
    assert [line["dev_accuracy"] for line in run.metrics()[:3]] == [0.0, 2 / 6, 2 / 6]
    if steps < 6:
        assert watcher.messages == [
            f"stopping after step {steps}: {patience} evaluations without improvement; the best is step 1"
        ]
        scripted["val 3 one-shot"].insert(0, "000000")
        train(training, Reference.of(training.policy), run, settings, watcher)  # going on stops at once
        assert training.progress.step == steps


def test_a_training_pays_the_rewards_of_its_settings(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every completion is given the same text, of the right form and a wrong answer."""

    monkeypatch.setattr(countdown, "score", scoring.score)  # undo the fixture above
    monkeypatch.setattr(Policy, "decode", lambda self, tokens: "<think>a</think><answer>1</answer>")
    _, run, _ = trained(small(tiny_folder, **{"reward.format_reward": 0.25, "train.num_iterations": 2}), tmp_path)
    assert {line["reward"] for line in run.metrics() if line["step"] > 0} == {0.5}


def test_long_completions_pay_a_penalty_that_is_logged(tiny_folder: Path, tmp_path: Path) -> None:
    """Two of eight tokens above the soft limit of 6, of 8 in all: half the penalty; one token: none."""
    settings = small(tiny_folder, **{"reward.length_penalty": 0.5, "reward.soft_limit": 6, "train.max_new_tokens": 8})
    _, run, _ = trained(settings, tmp_path)
    costs = {6: 0.0, 7: 0.25, 8: 0.5}
    for line in run.metrics()[1:]:
        rows = [row for group in run.groups(int(line["step"])) for row in group["completions"]]
        paid = [costs.get(row["length"], 0.0) for row in rows]
        assert [row["reward"] for row in rows] == [row["correct"] - cost for row, cost in zip(rows, paid, strict=True)]
        assert line["reward/length"] == pytest.approx(-sum(paid) / len(paid))
    assert any(line["reward/length"] < 0 for line in run.metrics()[1:])


class Fixed:
    """A rollout engine that answers every prompt with the same completions of 1 to G tokens."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def update_weights(self) -> None:
        """Nothing: it has none."""

    def sample(self, prompts: Sequence[list[int]], params: SamplingParams, **_: object) -> Rollout:
        size = params.num_generations
        completions = [[5] * length for _ in prompts for length in range(1, size + 1)]
        logprobs = [[-1.0] * len(tokens) for tokens in completions]
        return Rollout(completions, logprobs, [False] * len(completions), {"prefill": 0.0, "decode": 0.0}, 0)


def test_another_rollout_engine_needs_only_sample_and_update_weights(tiny_folder: Path, tmp_path: Path) -> None:
    settings = small(tiny_folder, **{"train.num_iterations": 1, "train.eval_puzzles": 2})
    state, run = start(settings), Run.create(tmp_path, "fixed")
    trainer = assemble(settings, state, Reference.of(state.policy), run)
    trainer.collector.engine = Fixed(state.policy)  # type: ignore[assignment]
    before = [weight.detach().clone() for weight in weights_of(state)]
    trainer.train()
    line = run.metrics()[1]
    assert line["completion_length"] == (1 + 2 + 3 + 4) / 4
    assert not all(map(torch.equal, before, weights_of(state)))


def question(problem: Problem) -> tuple[tuple[int, ...], int]:
    assert isinstance(problem, Puzzle)
    return problem.numbers, problem.target


CHOICES: list[dict[str, object]] = [
    {"loss.kl_in": "reward", "loss.loss_type": "grpo", "loss.beta": 0.5, "loss.baseline": "leave_one_out"},
    {"loss.pass_at_k": 2, "loss.dual_clip": 2.0, "train.num_mini_batches": 2, "train.num_inner_updates": 2},
    {"loss.entropy_share": 0.5, "loss.entropy_bonus": 0.01, "loss.scale_rewards": "mean"},
    {"loss.sampler_correction": "mask", "loss.sampler_level": "sequence", "loss.ratio_level": "sequence"},
]


@pytest.mark.parametrize("flags", CHOICES, ids=lambda flags: "-".join(key.rpartition(".")[2] for key in flags))
def test_a_training_takes_every_choice_of_the_loss(
    tiny_folder: Path, tmp_path: Path, reward_by_length: None, flags: dict[str, object]
) -> None:
    settings = small(tiny_folder, **{"train.num_iterations": 2, "train.eval_every": 2, **flags})
    state, run, _ = trained(settings, tmp_path, "one")
    before = start(settings).policy
    lines = [line for line in run.metrics() if line["step"]]
    assert [line["step"] for line in lines] == [1, 2] and all(0 < line["sampler_gap"] < 1e-5 for line in lines)
    assert any(
        not torch.equal(*pair) for pair in zip(state.policy.model.parameters(), before.model.parameters(), strict=True)
    )
    if flags.get("loss.kl_in") == "reward":
        assert lines[0]["kl"] < 1e-9 < lines[1]["kl"]
        assert [line["loss"] for line in lines] == pytest.approx([0, 0], abs=1e-6)


def test_a_step_whose_completions_are_all_masked_moves_nothing(
    tiny_folder: Path, tmp_path: Path, reward_by_length: None
) -> None:
    settings = small(tiny_folder, **{"train.num_iterations": 1, "train.max_new_tokens": 2, "loss.mask_truncated": True})
    state, run, _ = trained(settings, tmp_path, "one")
    (line,) = [line for line in run.metrics() if line["step"]]
    assert line["truncated"] == 1.0 and line["weights_changed"] == 0.0 and line["entropy"] > 0
    pairs = zip(state.policy.model.parameters(), start(settings).policy.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_sampled_accuracy_and_pass_at_k_are_logged_beside_the_greedy_one(
    tiny_folder: Path, tmp_path: Path, plain: tuple[State, Run, Watcher, Evaluation]
) -> None:
    run = plain[1]
    _, other, _ = trained(small(tiny_folder, **{"train.eval_samples": 4}), tmp_path)
    added = {"val_sampled", "val_sampled_low", "val_sampled_high", "val_pass_at_k"}
    for line, more in zip(run.metrics(), other.metrics(), strict=True):
        assert more.keys() - line.keys() == (added if "val_accuracy" in line else set())
        assert [more[name] for name in ("step", "reward", "loss") if name in more] == [
            line[name] for name in ("step", "reward", "loss") if name in line
        ]
        if "val_sampled" in more:
            assert 0 <= more["val_sampled_low"] <= more["val_sampled"] <= more["val_pass_at_k"] <= 1
            assert more["val_sampled"] <= more["val_sampled_high"]
    assert list(other.evaluations()) == list(run.evaluations())
