"""Where the time of a training went."""

import pytest

from grpo_cli.core.rl.summary import phases

STEP = {
    "step": 1, "time/total": 8.0, "time/rollout": 5.5, "time/prefill": 0.5, "time/decode": 4.5,
    "time/score": 0.25, "time/reference": 0.5, "time/update": 1.5, "time/optimizer": 0.25, "time/eval": 2.0,
}  # fmt: skip


def test_the_phases_add_up_to_the_whole_time() -> None:
    found = phases([{"step": 0, "time/eval": 6.0}, STEP, {**STEP, "step": 2}])
    assert found["decode"] == {"seconds": 9.0, "share": 9 / 26}
    assert found["other"]["seconds"] == pytest.approx(2 * (8 - 7.5))
    assert found["evaluation"]["seconds"] == 10.0
    assert sum(phase["share"] for phase in found.values()) == pytest.approx(1)
