"""Imitation before reinforcement."""

import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command, main, run_here, save_tiny_model, state_of
from torch import Tensor

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.contamination import known
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.load import load, load_tokenizer
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.schedule import Problems
from grpo_cli.core.rl.state import State
from grpo_cli.core.rl.warm_start import Lesson, Stage, demonstration, demonstrations, imitate, stages_of
from grpo_cli.core.run.folder import Run
from grpo_cli.core.task.data import puzzle_set
from grpo_cli.core.task.prompts import STYLES, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score

TRAIN = puzzle_set(3, "train")


def prompted(examples: list[tuple[Puzzle, str]]) -> list[Lesson]:
    return [Lesson(puzzle, prompt(puzzle, "zero-shot"), text) for puzzle, text in examples]


def test_a_demonstration_shows_each_try_worked_out() -> None:
    assert demonstration(Puzzle((10, 2, 7), 27), style="zero-shot") == (
        "<think>\n10 2 7 -> 27\n2+7+10=9+10=19 need 27 no\n7+10-2=17-2=15 need 27 no\n2+10-7=12-7=5 need 27 no\n"
        "2+7-10=9-10=-1 need 27 no\n10-2-7=8-7=1 need 27 no\n2*7+10=14+10=24 need 27 no\n2*7-10=14-10=4 need 27 no\n"
        "2*10+7=20+7=27 need 27 yes\n"
        "</think>\n<answer>2 * 10 + 7</answer>"
    )


@pytest.mark.parametrize("style", STYLES)
def test_every_demonstration_solves_its_puzzle_without_trying_twice(style: str) -> None:
    for puzzle in TRAIN:
        text = demonstration(puzzle, style=style)  # type: ignore[arg-type]
        tried = re.findall(r"^(\S+?)=.* (?:no|yes)$", text or "", re.MULTILINE)
        assert text and score(text, puzzle, style=style).correct, (puzzle, text)  # type: ignore[arg-type]
        assert len(tried) == len(set(tried)) >= 1


def test_short_and_long_searches_are_shown_equally_often() -> None:
    shown = demonstrations(TRAIN, ["zero-shot"] * 900, seed=3)
    lengths = [text.count(" no\n") for _, text in shown]
    assert min(lengths) == 0 and max(lengths) == 18
    each = Counter(demonstration(puzzle, style="zero-shot").count(" no\n") for puzzle in TRAIN)  # type: ignore[union-attr]
    assert all(lengths.count(length) >= min(each[length], 30) for length in range(19))  # all of a length, or about 50
    assert any("(" in text for _, text in shown)


def test_no_puzzle_is_shown_twice_before_all_were_shown_once() -> None:
    few = [puzzle for puzzle in TRAIN if demonstration(puzzle, style="zero-shot")][:50]
    for count, most in ((50, 1), (120, 3)):
        shown = demonstrations(few, ["zero-shot"] * count, seed=3)
        times = Counter(puzzle for puzzle, _ in shown)
        assert len(times) == 50 and max(times.values()) == most and min(times.values()) >= most - 1
    assert len({puzzle for puzzle, _ in demonstrations(TRAIN, ["zero-shot"] * 960, seed=0)}) == 960


def test_a_share_of_the_long_searches_gives_up() -> None:
    patient = demonstrations(TRAIN, ["zero-shot"] * 400, seed=3)
    assert demonstrations(TRAIN, ["zero-shot"] * 400, seed=3, give_up=0.0) == patient
    shown = demonstrations(TRAIN, ["zero-shot"] * 400, seed=3, give_up=0.75)
    longer = [text for (_, whole), (_, text) in zip(patient, shown, strict=True) if whole.count(" no\n") >= 5]
    given_up = [text for text in longer if "\ngive up\n</think>" in text]
    assert 0.65 < len(given_up) / len(longer) < 0.85
    assert all(text.count(" no\n") == 5 for text in given_up)
    assert sum("give up" in text for _, text in shown) == len(given_up)
    assert not any(score(text, puzzle, style="zero-shot").correct for puzzle, text in shown if "give up" in text)


def test_a_warm_start_makes_demonstrations_likely(tiny_policy: Policy) -> None:
    before = tiny_policy.sums()
    examples = prompted(demonstrations(TRAIN, ["zero-shot"] * 4, seed=3)) * 24
    losses = [loss for _, _, loss in imitate(state_of(tiny_policy), [Stage(examples, 3e-3)])]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert tiny_policy.sums() != before


def test_searches_that_do_not_fit_are_not_shown() -> None:
    shown = demonstrations(TRAIN, ["zero-shot"] * 50, seed=3, fits=lambda text: len(text) < 150)
    assert all(len(text) < 150 for _, text in shown)
    mixed = demonstrations(TRAIN, ["natural", "zero-shot"] * 25, seed=3, fits=lambda text: len(text) < 150)
    assert all(len(text) < 150 for _, text in mixed)  # tags make a zero-shot text longer
    with pytest.raises(CountdownError, match="no puzzle"):
        demonstrations(TRAIN, ["zero-shot"] * 50, seed=3, fits=lambda text: False)


def test_micro_batches_change_nothing_nor_does_running_out_of_memory(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses_of(rows: int) -> list[float]:
        policy = load(str(tiny_folder), device="cpu", precision="float32")
        examples = prompted(demonstrations(TRAIN, ["zero-shot"] * 16, seed=3))
        fit = MicroBatch(rows, report=said.append)
        return [loss for _, _, loss in imitate(state_of(policy), [Stage(examples, 1e-4)], micro_batch=fit)]

    said: list[str] = []
    whole, passes, logprobs = losses_of(0), list[int](), Policy.logprobs
    assert losses_of(3) == pytest.approx(whole, rel=1e-4)

    def limited(policy: Policy, sequences: Sequences, **options: Any) -> tuple[Tensor, Tensor]:
        passes.append(len(sequences.completions))
        if len(passes) == 2 or passes[-1] > 4:  # also in the middle of a step, after a backward pass
            raise torch.OutOfMemoryError
        return logprobs(policy, sequences, **options)

    monkeypatch.setattr(Policy, "logprobs", limited)
    assert losses_of(4) == pytest.approx(whole, rel=1e-4)
    assert passes == [4, 4, *[2] * 8]
    assert said == ["memory ran out in the warm start: repeating it with 2 completions at once"]


WARM = ["--precision", "float32", "--batch-size", 1, "--num-generations", 2, "--max-new-tokens", 60]
WARM += ["--eval-puzzles", 1, "--warm-start", 16, "--learning-rate", 1e-3, "--save-every", 1, "--beta", 0.1]
FEW = ["--max-number", 6]  # every puzzle's search is written before any is shown


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        (["--operations", "+-"], "searches with + - *"),
        (["--puzzles", "puzzles.jsonl"], "`--warm-start` has no effect with `--puzzles"),
        (["--numbers", 2, "--dry-run"], "shows puzzles of 3 or 4 numbers"),
        (["--prompt-numbers", "2 = 1, 3 = 0"], "shows puzzles of 3 or 4 numbers"),
        (["--max-new-tokens", 20], "no puzzle of this training"),
        (["--warm-start-impatient", 17, "--dry-run"], "`warm_start_impatient` must be at most `warm_start`"),
    ],
)
def test_what_cannot_be_demonstrated_is_refused_before_the_model_loads(
    countdown: Command, tiny_folder: Path, tmp_path: Path, flags: list[object], refusal: str
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "unloadable")
    (tmp_path / "unloadable" / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "puzzles.jsonl").write_text(
        "".join(f'{{"numbers": [{number}, 2, 4], "target": {number + 6}}}\n' for number in (1, 2, 3))
    )
    result = countdown("train", "--model", "unloadable", *WARM, *flags)
    assert (result.code, refusal in result.err) == (2, True), result.err
    assert not (tmp_path / "runs").exists()


def test_prompts_follow_the_training_s_mixture_of_styles(tiny_folder: Path) -> None:
    flags = {"train.warm_start": 64, "train.prompt_style": "one-shot = 1, natural = 1", "train.seed": 3}
    settings = resolve(flags=flags, has_cuda=lambda: False).settings
    (shown, _), *_ = stages_of(settings, Problems.of(settings), load_tokenizer(str(tiny_folder)))
    natural = [text for _, messages, text in shown if len(messages) == 2]  # a one-shot prompt has four messages
    assert 20 < len(natural) < 44
    assert all("\nThe expression is " in text for text in natural)
    assert sum("<answer>" in lesson.completion for lesson in shown) == 64 - len(natural)


def test_impatient_searches_come_last_more_gently(tiny_folder: Path) -> None:
    flags = {"train.warm_start": 300, "train.warm_start_impatient": 200, "train.seed": 3}
    settings = resolve(flags=flags, has_cuda=lambda: False).settings
    complete, last = stages_of(settings, Problems.of(settings), load_tokenizer(str(tiny_folder)))
    assert (complete.learning_rate, last.learning_rate) == (1e-4, 2e-5)
    assert (len(complete.lessons), len(last.lessons), len(last.batches)) == (300, 200, 25)
    assert not any("give up" in lesson.completion for lesson in complete.lessons)
    pairs = list(zip(complete.lessons, last.lessons, strict=False))  # the same puzzles again
    assert all(one.messages == other.messages for one, other in pairs)
    longer = [other for one, other in pairs if one.completion.count(" no\n") >= 5]
    given_up = sum("\ngive up\n" in lesson.completion for lesson in last.lessons)
    assert 0.8 < given_up / len(longer) < 1
    assert sum(one != other for one, other in pairs) == given_up


def test_stages_are_trainings_one_after_the_other(tiny_folder: Path) -> None:
    examples = prompted(demonstrations(TRAIN, ["zero-shot"] * 40, seed=3, give_up=0.5))
    stages = [Stage(examples[:16], 1e-3), Stage(examples[16:], 2e-4)]
    together, apart = (load(str(tiny_folder), device="cpu", precision="float32") for _ in range(2))
    steps = list(imitate(state_of(together), stages))
    assert [(step, count) for step, count, _ in steps] == [(step, 5) for step in range(1, 6)]
    losses = [loss for stage in stages for _, _, loss in imitate(state_of(apart), [stage])]
    assert [loss for _, _, loss in steps] == losses
    assert together.fingerprint() == apart.fingerprint()


def test_an_infinite_gradient_ends_a_warm_start_with_its_weights_unchanged(tiny_policy: Policy) -> None:
    examples = prompted(demonstrations(TRAIN, ["zero-shot"] * 16, seed=3))
    state, steps = state_of(tiny_policy), iter([False, True])

    def poll() -> None:  # before the only micro-batch of a step
        if next(steps):
            tiny_policy.trainable[0].register_hook(lambda gradient: gradient * float("inf"))

    training = imitate(state, [Stage(examples, 1e-4)], poll=poll)
    next(training)
    before = [weight.clone() for weight in tiny_policy.trainable]
    with pytest.raises(CountdownError, match="step 2 of the warm start: the gradient norm is not finite") as caught:
        next(training)
    assert caught.value.exit_code == 1 and "unchanged since the step before" in caught.value.message
    assert all(map(torch.equal, before, tiny_policy.trainable)) and state.progress.step == 1


def test_a_run_starts_from_the_warm_started_model_and_resumes_equal(
    countdown: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    train = ["train", "--model", tiny_folder, *WARM, *FEW]
    whole = countdown(*train, "--run", "whole", "--num-iterations", 2)
    assert whole.code == 0, whole.err
    assert "warm start: step 2 of 2, loss " in whole.err
    assert "after the warm start" in whole.out
    run = Run.open(tmp_path / "runs", "whole")
    warmed = load(str(run.warm_start_path), device="cpu", precision="float32")
    assert warmed.fingerprint()["weights"] == run.read_origin()["warm_start"]
    assert run.read_origin()["weights"] == load(str(tiny_folder), device="cpu").fingerprint()["weights"]
    assert run.read_origin()["warm_start"] != run.read_origin()["weights"]
    imitated = [json.loads(line) for line in (run.path / "warm_start.jsonl").read_text().splitlines()]
    keys = {Puzzle(tuple(line["numbers"]), line["target"]).key for line in imitated}
    assert len(imitated) == 16 and "->" in imitated[0]["completion"]
    assert keys <= known("whole", tmp_path / "runs").runs["whole"]
    assert countdown(*train, "--run", "halves", "--num-iterations", 1).code == 0
    resumed = countdown("train", "--run", "halves", "--resume", "--num-iterations", 2)
    assert resumed.code == 0, resumed.err
    assert "warm start: step" not in resumed.err
    ends = [load(str(Run.open(tmp_path / "runs", name).checkpoint_path(2) / "model")) for name in ("whole", "halves")]
    assert ends[0].fingerprint() == ends[1].fingerprint()
    lines = [Run.open(tmp_path / "runs", name).metrics()[-1] for name in ("whole", "halves")]
    assert [line["kl"] for line in lines] == [lines[0]["kl"]] * 2


@pytest.mark.faults
def test_a_run_without_its_warm_started_model_is_neither_resumed_nor_replayed_nor_changed(
    countdown: Command, undisturbed: Run, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.path, tmp_path / "runs/whole")
    run = Run.open(tmp_path / "runs", "whole")
    shutil.rmtree(run.warm_start_path)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
    for line in (["train", "--run", "whole", "--resume", "--num-iterations", 2], ["why", "whole", "--step", 1]):
        refused = countdown(*line)
        assert refused.code == 2 and "warm_start` is gone, the model from which run `whole` started" in refused.err
        assert {path: path.read_bytes() for path in before} == before


def test_a_resumed_run_takes_a_flag_that_its_own_settings_give_effect(
    countdown: Command, undisturbed: Run, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.path, tmp_path / "runs/whole")
    same = countdown("train", "--run", "whole", "--resume", "--warm-start-impatient", 16)
    assert same.code == 0, same.err
    other = countdown("train", "--run", "whole", "--resume", "--warm-start-impatient", 8)
    assert other.code == 2 and "cannot change train.warm_start_impatient from 16 to 8" in other.err


def stop_after_step_2(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Send a signal once the second step of a warm start is saved."""
    save = State.save

    def save_and_stop(state: State, run: Run, settings: Settings) -> None:
        is_first = not run.checkpoint_path(2).exists()
        save(state, run, settings)
        if run.path.name == "warming" and state.progress.step == 2 and is_first:
            signal.raise_signal(number)

    monkeypatch.setattr(State, "save", save_and_stop)


OFTEN = [*WARM, *FEW, "--num-iterations", 1, "--warm-start-impatient", 16, "--save-minutes", 1e-9]


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here(folder, "train", "--model", tiny_folder, *OFTEN, "--run", "whole")
    return Run.open(folder / "runs", "whole")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "is_damaged"), [(signal.SIGINT, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)]
)
def test_a_warm_start_that_was_stopped_continues_equal(
    countdown: Command,
    undisturbed: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    is_damaged: bool,
) -> None:
    with monkeypatch.context() as patch:
        stop_after_step_2(patch, number)
        stopped = countdown("train", "--model", tiny_folder, *OFTEN, "--run", "halves")
    assert stopped.code == 128 + number
    assert "after step 2; resume with: countdown train --run halves --resume" in " ".join(stopped.err.split())
    halves = Run.open(tmp_path / "runs", "halves")
    assert [step for step, _ in halves.warming.checkpoints()] == [1, 2] and not halves.warm_start_path.exists()
    if is_damaged:
        (halves.warming.checkpoint_path(2) / "state.pt").write_bytes(b"")
    resumed = countdown("train", "--run", "halves", "--resume")
    assert resumed.code == 0, resumed.err
    assert ("skipping the checkpoint of step 2" in resumed.err) == is_damaged
    assert f"warm start: continuing after step {1 if is_damaged else 2}" in resumed.err
    ends = [load(str(run.warm_start_path), device="cpu").fingerprint() for run in (undisturbed, halves)]
    assert ends[0] == ends[1] and not halves.warming.path.exists()
    assert undisturbed.read_origin() == halves.read_origin()
    assert undisturbed.metrics()[-1]["kl"] == halves.metrics()[-1]["kl"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, and a run whose warm start from it was stopped, `first`."""
    folder = tmp_path_factory.mktemp("begun")
    save_tiny_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stop_after_step_2(patch, signal.SIGINT)
        assert main("train", "--model", "model", *OFTEN, "--run", "first") == 130
    return folder


@pytest.mark.faults
@pytest.mark.parametrize("changed", ["config.json", "model"])
def test_a_warm_start_continues_only_as_it_began(countdown: Command, begun: Path, tmp_path: Path, changed: str) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    run = Run.open(tmp_path / "runs", "first")
    if changed == "model":
        save_tiny_model(tmp_path / "model", hidden_size=16, num_attention_heads=2)
    else:
        config = json.loads(run.config_path.read_text())
        config["train"]["learning_rate"] = 0.5
        run.config_path.write_text(json.dumps(config))
    refused = countdown("train", "--run", "first", "--resume")
    assert refused.code == 2 and "have changed since step 2 of its warm start" in " ".join(refused.err.split())
    assert [step for step, _ in run.warming.checkpoints()] == [1, 2]


def test_a_reference_is_loaded_before_the_warm_start(
    countdown: Command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_cli.core.rl.warm_start.imitate", lambda *_, **__: pytest.fail("minutes are lost"))
    shutil.copytree(tiny_folder, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"no weights")
    refused = countdown("train", "--model", tiny_folder, *WARM, "--ref-model", "other")
    assert (refused.code, "other" in refused.err) == (2, True), refused.err
    assert not list(tmp_path.glob("runs/*"))


def test_a_request_to_save_does_not_end_a_warm_start(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: Any, **options: Any) -> list[tuple[int, int, float]]:
        signal.raise_signal(signal.SIGUSR1)
        return []

    monkeypatch.setattr("grpo_cli.core.rl.warm_start.imitate", asked)
    before = signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("it would have ended the process"))
    try:
        result = countdown("train", "--model", tiny_folder, *WARM, *FEW, "--num-iterations", 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert result.code == 0
    assert "warm start: imitating 16 searches" in result.err


def test_an_interrupt_between_imitation_and_the_first_step_is_said_and_the_run_resumes(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "--model", tiny_folder, *WARM, *FEW, "--num-iterations", 1, "--run", "first"]
    with monkeypatch.context() as patch:
        patch.setattr("grpo_cli.core.rl.build._state", lambda *_: signal.raise_signal(signal.SIGINT))
        stopped = countdown(*arguments)
    assert stopped.code == 130 and "interrupted before the first step" in stopped.err
    resumed = countdown("train", "--run", "first", "--resume")
    assert resumed.code == 0 and "warm start: step" not in resumed.err


def test_a_warm_start_takes_no_more_completions_at_once_than_were_planned(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def seen(*_: Any, micro_batch: MicroBatch, **__: Any) -> list[tuple[int, int, float]]:
        rows.append(micro_batch.rows)
        return []

    monkeypatch.setattr("grpo_cli.core.rl.warm_start.imitate", seen)
    for flags in ([], ["--num-generations", 4, "--micro-batch-size", 3]):
        assert countdown("train", "--model", tiny_folder, *WARM, *FEW, "--num-iterations", 1, *flags).code == 0
    assert rows == [2, 3]


@pytest.mark.faults
def test_a_full_disk_is_found_before_the_warm_start(
    countdown: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr("grpo_cli.core.rl.warm_start.imitate", lambda *_, **__: pytest.fail("minutes are lost"))
    result = countdown("train", "--model", tiny_folder, *WARM)
    assert result.code == 1 and "MB free, and a checkpoint needs" in result.err
