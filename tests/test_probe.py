"""What a probe says of groups whose shares are known by hand, and of a tiny model."""

import itertools
from dataclasses import replace

import pytest

from grpo_cli.core.evals.evaluate import Completion, Evaluator
from grpo_cli.core.evals.statistics import wilson
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rl.probe import PUZZLES, Probe, Sampled, chosen_puzzles, measure, probe
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams
from grpo_cli.core.task.data import enumerate_puzzles
from grpo_cli.core.task.prompts import STYLES, Style
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score

PUZZLE = Puzzle((2, 4, 6), 12)
RIGHT, WRONG, BARE = "<think>x</think><answer>2 + 4 + 6</answer>", "<think>x</think><answer>2 * 4 + 6</answer>", "no"


def completion(text: str, length: int = 10, truncated: bool = False) -> Completion:
    return Completion(PUZZLE, text, length, truncated, score(text, PUZZLE, truncated=truncated))


def test_every_figure_by_hand() -> None:
    groups = [[RIGHT, RIGHT], [RIGHT, WRONG], [WRONG, WRONG], [BARE, WRONG]]
    found = measure("one-shot", [[completion(text) for text in group] for group in groups], 3.0)
    assert found.right == [2, 1, 0, 0]
    assert found.mixed == [False, True, False, True]  # the last differs in format alone
    assert (found.accuracy, found.mixed_share, found.format_rate) == (3 / 8, 0.5, 7 / 8)
    assert found.interval == wilson(3 / 8, 4)  # four puzzles, not eight completions
    cut = measure("one-shot", [[completion(RIGHT, 10), completion(BARE, 30, truncated=True)]], 1.0)
    assert (cut.truncated, cut.mean_length, cut.tokens, cut.seconds) == (0.5, 20.0, 40, 1.0)


def sampled(style: Style, right: list[int], *, mixed: list[bool] | None = None, truncated: float = 0.0) -> Sampled:
    """32 groups of 8."""
    return Sampled(
        style=style,
        num_generations=8,
        right=right,
        mixed=[0 < hits < 8 for hits in right] if mixed is None else mixed,
        format_rate=1.0,
        truncated=truncated,
        mean_length=50.0,
        tokens=12_800,
        seconds=1.0,
    )


SOME = [4] * 12 + [0] * 10 + [8] * 10
RARE = [1] * 4 + [0] * 28


def found(one: Sampled, other: Sampled | None = None, *, numbers: int = 3) -> dict[str, str]:
    styles = {one.style: one} | ({other.style: other} if other else {})
    return Probe(one.style, numbers, styles).findings


@pytest.mark.parametrize(
    ("right", "mixed", "truncated", "numbers", "signs", "says"),
    [
        (SOME, None, 0.0, 3, {"signal"}, "there is something to learn from: in 12 of 32 one-shot groups"),
        (SOME, None, 0.29, 3, {"signal"}, "something"),
        (SOME, None, 0.31, 3, {"signal", "truncated"}, "31% of the completions reach the token limit"),
        ([8] * 32, None, 0.0, 3, {"signal"}, "nothing is left to learn: 100% of the completions are correct"),
        ([8] * 30 + [7] * 2, None, 0.0, 3, {"signal"}, "little is left to learn: 99%"),
        ([0] * 32, None, 0.0, 3, {"signal", "never"}, "fewer `--numbers`, another `--model`, or `--warm-start`"),
        ([0] * 32, None, 0.0, 2, {"signal", "never"}, "use another `--model`"),
        ([0] * 32, [True] * 9 + [False] * 23, 0.0, 3, {"signal", "never"}, "only the format to learn from: in 9 of 32"),
        ([8] * 16 + [0] * 16, None, 0.0, 3, {"signal"}, "there is nothing to learn from: in 0 of 32"),
        (RARE, None, 0.0, 3, {"signal", "groups"}, "raise `--num-generations`"),
        ([1] * 7 + [0] * 25, None, 0.0, 3, {"signal", "groups"}, "most groups have no gradient"),
        ([1] * 8 + [0] * 24, None, 0.0, 3, {"signal"}, "in 8 of 32"),  # a quarter of the groups teaches
    ],
)
def test_findings(
    right: list[int], mixed: list[bool] | None, truncated: float, numbers: int, signs: set[str], says: str
) -> None:
    said = found(sampled("one-shot", right, mixed=mixed, truncated=truncated), numbers=numbers)
    assert said.keys() == signs
    assert says in " ".join(said.values())


@pytest.mark.parametrize(
    ("extra", "advised"),
    [
        (5, False),  # p = 2 / 2**5 = 0.0625
        (6, True),  # 0.03125
    ],
)
def test_another_style_is_advised_only_if_chance_does_not_explain_it(extra: int, advised: bool) -> None:
    one = sampled("one-shot", SOME)
    said = found(one, sampled("zero-shot", [4] * (12 + extra) + [0] * (20 - extra)))
    assert ("style" in said) == advised
    assert not advised or "zero-shot has 18 such groups" in said["style"]
    assert "style" not in found(sampled("zero-shot", [4] * 20 + [0] * 12), one)


def test_two_other_styles_are_two_chances_to_err() -> None:
    one, better = sampled("one-shot", SOME), sampled("zero-shot", [4] * 18 + [0] * 14)  # p = 2 * 0.03125
    assert "style" not in Probe("one-shot", 3, {s.style: s for s in (one, better, sampled("natural", SOME))}).findings


def test_the_puzzles_are_a_fixed_sample_of_the_train_split() -> None:
    puzzles = list(enumerate_puzzles(3, "train"))
    one = chosen_puzzles(puzzles, 0)
    assert one == chosen_puzzles(puzzles, 0) != chosen_puzzles(puzzles, 1)
    assert len(set(one)) == PUZZLES and set(one) <= set(puzzles)
    assert sorted(chosen_puzzles(puzzles[:5], 0), key=str) == sorted(puzzles[:5], key=str)


@pytest.mark.parametrize(
    ("step", "groups"),
    [
        (0.0, [32, 32, 32]),
        (25.0, [2, 1, 1]),  # 25 seconds a group: four groups are done by 100 seconds, a fifth would end at 125
        (500.0, [1, 0, 0]),  # one group alone takes longer
    ],
)
def test_a_probe_stops_when_its_time_is_up(tiny_policy: Policy, step: float, groups: list[int]) -> None:
    """A clock that advances by `step` seconds between the start and the end of each evaluation."""
    times = itertools.count()
    result = probe(
        Evaluator(LocalEngine(tiny_policy), SamplingParams(2, num_generations=2), batch_size=2),
        chosen_puzzles(list(enumerate_puzzles(3, "train")), 0),
        chosen="one-shot",
        clock=lambda: step * (next(times) // 2),  # called at the start, then before and after each evaluation
    )
    assert [len(result.styles[style].right) if style in result.styles else 0 for style in STYLES] == groups


def test_every_style_is_sampled_on_the_same_puzzles_the_same_way_twice(tiny_policy: Policy) -> None:
    policy = replace(tiny_policy, end_ids=tuple(range(0, 832, 16)))
    puzzles, told = list(enumerate_puzzles(3, "train"))[:4], list[tuple[int, int]]()

    def probed() -> Probe:
        return probe(
            Evaluator(LocalEngine(policy), SamplingParams(16, num_generations=3), batch_size=6, seed=5),
            puzzles,
            chosen="zero-shot",
            progress=lambda done, total: told.append((done, total)),
        )

    one, two = probed(), probed()
    assert list(one.styles) == list(STYLES) and (one.chosen, one.numbers) == ("zero-shot", 3)
    assert told[:9] == [(done, 12) for done in (1, 2, 3, 5, 7, 9, 10, 11, 12)]  # one puzzle, two, and the last
    for style, found in one.styles.items():
        assert (len(found.right), len(found.mixed), found.num_generations) == (4, 4, 3)
        assert found.tokens == round(12 * found.mean_length) and 0 < found.truncated < 1 and found.seconds > 0
        assert replace(found, seconds=0.0) == replace(two.styles[style], seconds=0.0)
