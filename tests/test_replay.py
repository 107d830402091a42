"""A step taken again equals the one that was logged, and leaves the run as it is."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_train import reward_by_length as reward_by_length
from test_train import small, spoil

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.rl.build import train
from grpo_cli.core.rl.explain import OWN
from grpo_cli.core.rl.replay import Replay, cached, plan, replay
from grpo_cli.core.run.folder import Run
from grpo_cli.ui.why import explained


@pytest.fixture(scope="module")
def root(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, reward_by_length: Iterator[None]) -> Path:
    root = tmp_path_factory.mktemp("replayed")
    usual = {"runs": str(root), "train.keep_last": 2, "train.eval_every": 4, "train.num_inner_updates": 2}
    train(small(tiny_folder, **usual), "first")
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    return Run(root / "first")


def contents(run: Run) -> dict[str, str]:
    files = [path for path in run.path.rglob("*") if path.is_file() and path.parent.name != "why"]
    return {str(path): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}


def test_a_replay_starts_at_the_nearest_earlier_checkpoint(run: Run) -> None:
    assert [(one.start, one.seconds > 0) for one in (plan(run, step) for step in (1, 2, 3, 4))] == [
        (0, True), (0, True), (2, True), (2, True),
    ]  # fmt: skip
    assert plan(run, 2).seconds > plan(run, 1).seconds


@pytest.mark.parametrize("step", [0, 5, -1])
def test_a_step_that_was_not_logged_is_refused(run: Run, step: int) -> None:
    with pytest.raises(CountdownError, match=f"has no step {step}") as caught:
        plan(run, step)
    assert caught.value.hint == "choose one from 1 to 4"


@pytest.fixture(scope="module")
def second(run: Run) -> Replay:
    before = contents(run)
    found = replay(run, plan(run, 2), losses=True)
    assert contents(run) == before
    return found


def test_a_replay_from_the_start_equals_the_log(run: Run, second: Replay) -> None:
    assert second.gap == 0.0
    assert second.replayed.keys() == second.logged.keys() >= {"reward", "loss", "kl", "grad_norm", "entropy"}
    kept = [row for group in run.groups(2) for row in group["completions"]]
    assert [row["completion"] for row in kept] == [one.text for one in second.completions]
    assert [row["advantage"] for row in kept] == [one.advantage for one in second.completions]


def test_the_terms_of_a_replay_add_up_to_the_logged_loss(second: Replay) -> None:
    assert second.updates == 2 and {len(one.updates) for one in second.completions} == {2}
    assert second.total("loss") == pytest.approx(second.logged["loss"], abs=1e-6)


def test_a_replay_from_a_checkpoint_equals_the_log(run: Run) -> None:
    found = replay(run, plan(run, 4))
    assert (found.start, found.last_step, found.gap) == (2, 4, 0.0)
    for one in found.completions:
        assert one.last == pytest.approx(one.after, abs=1e-5)  # the last checkpoint is the one after this step
        assert one.sampled == pytest.approx(one.before, abs=1e-4)


def test_gradients_of_other_losses_are_compared(second: Replay) -> None:
    by_name = {variant.name: variant for variant in second.variants}
    assert by_name[OWN].cosine == pytest.approx(1.0, abs=1e-9)
    assert len(by_name) == 1 + 4 + 3 + 4
    assert all(-1 <= variant.cosine <= 1 + 1e-9 and variant.norm > 0 for variant in second.variants)
    # At ratio 1, `gspo` weights tokens as `grpo` does.
    assert by_name["loss_type gspo"].norm == pytest.approx(by_name["loss_type grpo"].norm, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [{"loss.pass_at_k": 2}, {"loss.baseline": "leave_one_out", "loss.kl_in": "reward", "loss.beta": 0.5}],
    ids=str,
)
def test_the_gradient_as_trained_has_the_norm_of_the_step(
    tiny_folder: Path, tmp_path: Path, reward_by_length: None, flags: dict[str, object]
) -> None:
    train(small(tiny_folder, **{"runs": str(tmp_path), "train.num_iterations": 1, **flags}), "one")
    run = Run(tmp_path / "one")
    compared = replay(run, plan(run, 1), losses=True)
    norms = {variant.name: variant.norm for variant in compared.variants}
    assert compared.logged["grad_norm"] > 0
    assert norms[OWN] == pytest.approx(compared.logged["grad_norm"], rel=1e-4)


def test_a_replay_is_kept_until_the_run_changes(run: Run, second: Replay) -> None:
    assert cached(run, 2, losses=True) == second
    assert cached(run, 3, losses=False) is None
    path = next((run.path / "why").glob("step-2*"))
    content = path.read_bytes()
    for damaged in (content[:-9], b"", b"{}"):
        path.write_bytes(damaged)
        assert cached(run, 2, losses=False) is None
    path.write_bytes(content)


def test_the_fork_of_a_group_has_its_chances(second: Replay) -> None:
    group = second.groups[second.instructive]
    assert any(one.advantage for one in group.completions)
    parting = group.fork
    assert parting is not None
    chances = group.chances(parting)
    assert chances.keys() == {"sampled", "after", "last"}
    assert all(0 < share <= 1 for pair in chances.values() for share in pair)


SETTINGS = [
    {"model.lora_rank": 2},
    {"train.dynamic_sampling": 1, "loss.beta": 0.0, "loss.loss_type": "grpo"},
    {"loss.loss_type": "cispo", "train.num_inner_updates": 2, "loss.scale_rewards": "batch"},
    {"train.optimizer": "adamw8bit", "train.prompt_style": "one-shot = 1, natural = 1"},
    {"train.temperature": 0.7, "train.micro_batch_size": 3, "loss.kl_estimator": "original"},
    {
        "train.num_mini_batches": 2,
        "train.num_inner_updates": 2,
        "loss.entropy_share": 0.5,
        "loss.entropy_bonus": 0.1,
    },
    pytest.param({"loss.mask_truncated": True}, marks=pytest.mark.slow),
    {"loss.sampler_correction": "mask", "train.temperature": 0.7, "train.broken": "temperature"},
    *(pytest.param({"train.broken": name}, marks=pytest.mark.slow) for name in ("kl", "prompt", "end")),
]


@pytest.mark.parametrize("flags", SETTINGS, ids=lambda flags: next(iter(flags)))
def test_runs_of_other_settings_replay_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, reward_by_length: None, flags: dict[str, object]
) -> None:
    if "model.lora_rank" in flags:
        pytest.importorskip("peft")
    train(
        small(tiny_folder, **{"runs": str(tmp_path), "train.eval_every": 4, "train.num_iterations": 3, **flags}), "one"
    )
    run = Run(tmp_path / "one")
    before = contents(run)
    for step in (1, 3):
        found = replay(run, plan(run, step))
        assert found.gap == 0.0, (found.logged, found.replayed)
        assert found.total("loss") == pytest.approx(found.logged["loss"], abs=1e-6)
        said = explained(found, "one", sample=0)
        text = " ".join([*said["sentences"], *said["formula"], *(row["verdict"] for row in said["completions"])])
        named = {
            "added nothing to the loss": found.loss.mask_truncated,
            ", masked": found.loss.mask_truncated,
            "the entropy bonus is -": found.loss.entropy_bonus,
            "the mean of": found.updates > 1,
            "factor: ": found.loss.sampler_correction != "none" or found.loss.entropy_share < 1,
        }
        assert {words: words in text for words in named} == {words: bool(held) for words, held in named.items()}
    assert contents(run) == before


def test_a_run_of_another_model_is_not_replayed(run: Run, tmp_path: Path, reward_by_length: None) -> None:
    """The starting model has changed since: the replay would explain a step that never was."""
    moved = Run(Path(shutil.copytree(run.path, tmp_path / "runs" / "first")))
    moved.write_origin({**moved.read_origin(), "weights": "0" * 64})
    with pytest.raises(CountdownError, match="did not start from this"):
        replay(moved, plan(moved, 1))


def test_a_step_that_was_skipped_replays_without_writing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward_by_length: None
) -> None:
    spoil(monkeypatch, "loss", float("nan"), {2})
    usual = {"runs": str(tmp_path), "train.eval_every": 4, "train.save_every": 1, "train.max_bad_steps": 2}
    train(small(tiny_folder, **usual), "one")
    run = Run(tmp_path / "one")
    assert run.metrics()[2]["bad_steps"] == 1
    spoil(monkeypatch, "loss", float("nan"), {2})
    before = contents(run)
    found = replay(run, plan(run, 2))
    assert contents(run) == before
    assert "loss" not in found.replayed and found.gap == 0.0


def test_a_run_of_vllm_is_not_replayed(run: Run, tmp_path: Path) -> None:
    """It draws other completions; the hint names the folder of the runs."""
    moved = Run(Path(shutil.copytree(run.path, tmp_path / "other" / "first")))
    moved.config_path.write_text(moved.config_path.read_text().replace('"rollout": "local"', '"rollout": "vllm"'))
    with pytest.raises(CountdownError, match="vLLM does not draw the same completions again") as caught:
        plan(moved, 1)
    assert caught.value.hint == f"`countdown why first --runs {tmp_path / 'other'}` describes the run as a whole"
