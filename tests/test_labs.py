"""Planted bugs: each replaces its seam while its block runs, leaves a trace that a rule names, and is gone after it."""

from typing import Any, cast, get_args

import pytest
import torch
from test_health import HEALTHY

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.config.settings import Settings, Train
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl import grpo, train
from grpo_cli.core.rl.batch import Batch, Group, Tally
from grpo_cli.core.rl.collect import Collector
from grpo_cli.core.rl.health import diagnose, warnings
from grpo_cli.core.rl.labs import BUGS, broken, planted
from grpo_cli.core.task.task import Score

ALONE = ("temperature",)  # has no effect at temperature 1


def given(name: str, **flags: object) -> Settings:
    flags = {"preset": "builtin", "train.broken": name, **{key.replace("__", "."): one for key, one in flags.items()}}
    return resolve(flags=flags, has_cuda=lambda: False).settings


def test_the_setting_lists_every_bug() -> None:
    choices = get_args(Train.model_fields["broken"].annotation)
    assert choices == ("none", *BUGS, "mystery")


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_lasts_as_long_as_its_block(name: str) -> None:
    seams = [(owner, attribute) for owner, attribute, _ in BUGS[name].seams]
    sound = [vars(owner)[attribute] for owner, attribute in seams]
    with pytest.raises(RuntimeError), broken(given(name, train__temperature=0.7)):
        assert all(vars(owner)[key] is not one for (owner, key), one in zip(seams, sound, strict=True))
        raise RuntimeError
    assert [vars(owner)[attribute] for owner, attribute in seams] == sound


@pytest.mark.parametrize(
    ("name", "flags", "hint"), [("temperature", {}, "--temperature"), ("kl", {"loss__beta": 0.0}, "--beta")]
)
def test_a_bug_without_effect_is_refused(name: str, flags: dict[str, object], hint: str) -> None:
    with pytest.raises(CountdownError, match="has no effect") as caught, broken(given(name, **flags)):
        pass
    assert hint in (caught.value.hint or "")


def test_a_mystery_is_drawn_by_the_seed_among_bugs_with_an_effect() -> None:
    drawn = [planted(given("mystery", train__seed=seed)) for seed in range(60)]
    assert drawn == [planted(given("mystery", train__seed=seed)) for seed in range(60)]
    assert set(drawn) == set(BUGS) - {"temperature"}


def test_advantages_without_a_baseline_are_the_rewards_and_mixed_ones_center_over_other_prompts() -> None:
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # (P, G)
    assert not vars(train)["advantages"](rewards, scale="none").any()  # both groups are equal
    with broken(given("baseline")):
        assert torch.equal(vars(train)["advantages"](rewards, scale="none"), rewards)
    with broken(given("groups")):
        assert vars(train)["advantages"](rewards, scale="none").tolist() == [[0.5, 0.5], [-0.5, -0.5]]


def test_the_mask_ends_a_token_early_and_the_kl_has_the_other_sign() -> None:
    sequences = Sequences([[1]], [[2, 3], [2, 3, 4]], [0, 0])
    logprobs, reference = torch.tensor([[-1.0]]), torch.tensor([[-2.0]])
    sound = grpo.kl_estimate(logprobs, reference)
    with broken(given("end")):
        assert sequences.mask().tolist() == [[True, False, False], [True, True, False]]
    with broken(given("kl")):
        assert torch.equal(grpo.kl_estimate(logprobs, reference), -sound)
    assert sequences.mask().sum() == 5


def a_batch() -> Batch:
    group = Group(0, cast(Any, None), "one-shot", [7, 8, 9], [[1], [2, 3]], [[-1.0], [-2.0, -3.0]], [False] * 2, [], [],
                  torch.zeros(2), torch.zeros(2))  # fmt: skip
    return Batch(1, [group], Tally(torch.zeros(1, 2), {}, 3, 0), {}, 3)


def test_prompt_tokens_move_into_completions_with_the_references_log_probs() -> None:
    reference = torch.full((2, 4), -0.5)
    with broken(given("prompt")):
        examples = a_batch().examples(reference, has_gradient=True)
        without = a_batch().examples(None, has_gradient=True)
    assert examples.sequences == Sequences([[7]], [[8, 9, 1], [8, 9, 2, 3]], [0, 0])
    assert examples.sampled_logprobs == [[-0.5, -0.5, -1.0], [-0.5, -0.5, -2.0, -3.0]]
    assert without.sampled_logprobs[0] == [0.0, 0.0, -1.0]
    assert a_batch().sequences == Sequences([[7, 8, 9]], [[1], [2, 3]], [0, 0])


@pytest.mark.parametrize(("answer", "reward"), [("1", 1.0), ("4 + x", 1.0), ("none", 0.2), (None, 0.0)])
def test_any_number_pays(answer: str | None, reward: float, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Score(0.2 if answer else 0.0, False, "wrong_value", answer)
    monkeypatch.setattr(Collector, "_score", lambda *_: own)
    with broken(given("reward")):
        assert Collector._score(cast(Any, None), "", cast(Any, None), "", False, 1).reward == reward


def test_a_prompt_without_its_template_is_the_bare_text(tiny_policy: Policy) -> None:
    messages = [{"role": "user", "content": "4 7 3"}]
    with broken(given("template")):
        bare = tiny_policy.encode(messages)
    assert tiny_policy.tokenizer.decode(bare) == "4 7 3\n"
    assert tiny_policy.encode(messages) != bare


SOUND = {**HEALTHY, "templated": 1.0, "loss_tokens": 1.0, "advantage": 1e-8, "group_advantage": 1e-7}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"templated": 0.0}, "template"),
        ({"loss_tokens": 0.987}, "mask"),
        ({"loss_tokens": 4.1}, "mask"),
        ({"advantage": 0.4, "group_advantage": 1.0}, "baseline"),
        ({"group_advantage": 0.4}, "groups"),
    ],
)
def test_what_no_chance_makes_is_named_after_the_first_step(changes: dict[str, float], rule: str | None) -> None:
    assert warnings([{**SOUND, **changes}]).keys() == ({rule} if rule else set())


@pytest.mark.parametrize(("exact", "gap", "named"), [(True, 2e-3, 1), (True, 1e-6, 0), (False, 2e-3, 0)])
def test_another_distribution_is_named_where_rounding_cannot_explain_it(exact: bool, gap: float, named: int) -> None:
    loss = given("none").loss
    found = diagnose([{**SOUND, "step": 1, "sampler_gap": gap}], loss, exact=exact)
    assert len([one for one in found if "without the temperature" in one["text"]]) == named
