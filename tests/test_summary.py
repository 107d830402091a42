"""Where the time of a training went, and what the rules say of it."""

from typing import Any

import pytest

from grpo_cli.core.rl.summary import phases, verdict

STEP = {
    "step": 1, "floor_share": 0.2, "time/total": 8.0, "time/rollout": 5.5, "time/prefill": 0.5, "time/decode": 4.5,
    "time/score": 0.25, "time/reference": 0.5, "time/update": 1.5, "time/optimizer": 0.25, "time/eval": 2.0,
    "floor/prefill": 0.25, "floor/decode": 0.5, "floor/reference": 0.25, "floor/update": 0.75, "floor/optimizer": 0.1,
    "arithmetic/prefill": 0.25, "arithmetic/decode": 0.01, "arithmetic/reference": 0.25, "arithmetic/update": 0.75,
    "arithmetic/optimizer": 0.0,
}  # fmt: skip


def test_the_phases_add_up_to_the_whole_time() -> None:
    found = phases([{"step": 0, "time/eval": 6.0}, STEP, {**STEP, "step": 2}])
    assert found["decode"] == {"seconds": 9.0, "share": 9 / 26, "floor": 1.0, "matrix": 0.02}
    assert found["other"]["seconds"] == pytest.approx(2 * (8 - 7.5))
    assert found["evaluation"]["seconds"] == 10.0
    assert sum(phase["share"] for phase in found.values()) == pytest.approx(1)


def test_a_run_without_phases_has_none() -> None:
    assert phases([{"step": 0}, {"step": 1, "time/total": 3.0, "time/rollout": 2.0}]) == {}
    assert verdict({}) == []


def phase(seconds: float, share: float, floor: float, matrix: float) -> dict[str, float]:
    return {"seconds": seconds, "share": share, "floor": floor, "matrix": matrix}


@pytest.mark.parametrize(
    ("name", "found", "sentence"),
    [
        (
            "decode",
            phase(10, 0.61, 1.2, 0.1),
            "decode takes 61% of the time, at 12% of the memory bandwidth: bound by the overhead of each operation;"
            " more completions per prompt cost less than proportionally",
        ),
        (
            "decode",
            phase(10, 0.61, 6, 0.1),
            "decode takes 61% of the time, at 60% of the memory bandwidth: bound by reading and writing memory;"
            " more completions per prompt cost less than proportionally",
        ),
        ("update", phase(10, 0.5, 4.5, 4.5), "update takes 50% of the time, at 45% of the matrix rate: bound by"
            " arithmetic"),
        ("optimizer", phase(1, 0.3, 2, 0), "optimizer takes 30% of the time, at 200% of the memory bandwidth: the"
            " data stays in a cache"),
        ("evaluation", {"seconds": 4, "share": 0.4}, "evaluation takes 40% of the time; a larger `--eval-every` or"
            " fewer `--eval-puzzles` save it"),
        ("score", {"seconds": 4, "share": 0.4}, "score takes 40% of the time"),
    ],
)  # fmt: skip
def test_what_bounds_a_phase(name: str, found: dict[str, Any], sentence: str) -> None:
    assert verdict({name: found}) == [sentence]


def test_only_phases_that_matter_get_a_sentence_and_the_longest_comes_first() -> None:
    found = {
        "a": {"seconds": 3.0, "share": 0.3},
        "b": {"seconds": 6.0, "share": 0.6},
        "c": {"seconds": 1, "share": 0.1},
    }
    assert [sentence[0] for sentence in verdict(found)] == ["b", "a"]
    assert len(verdict({name: {"seconds": 1.0, "share": 0.1} for name in "abcdefghij"})) == 1
