"""The figure of a fork: every completion once, those of each way together, and the probabilities of both."""

from typing import Any

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.ui.fork import fork_figure

STAGES = {"sampled": "when sampled", "after": "after the step"}


def data(**changes: Any) -> dict[str, Any]:
    def way(piece: str, samples: list[int], chances: tuple[float, float]) -> dict[str, Any]:
        endings = {str(sample): f"{piece} goes on {sample}\n$x$ \x1b" for sample in samples}
        stages = dict(zip(STAGES, chances, strict=True))
        return {"continues": repr(piece), "samples": samples, "endings": endings, "probability": stages}

    fork = {
        "token": 3, "before": "No.\n", "stages": STAGES,
        "better": way("2", [1], (0.25, 0.5)), "worse": way("I", [0, 3], (0.75, 0.5)),
    }  # fmt: skip
    rows = [
        {"sample": sample, "reason": "correct" if sample == 1 else "wrong_value", "verdict": "wrong value"}
        for sample in range(4)
    ]
    return {"prompt": 6, "problem": "[2, 6, 9] -> 30", "completions": rows, "fork": fork, **changes}


def test_each_completion_is_a_line_and_each_probability_a_bar() -> None:
    figure = fork_figure(data())
    left, right = figure.axes
    texts = [text.get_text() for text in left.texts]
    assert [text for text in texts if text in "✓✗"] == ["✓", "✗", "✗", "✗"]
    assert texts[2].startswith("2 goes on 1 ⏎ ") and "\x1b" not in "".join(texts)
    assert sum("another way" in text for text in texts) == 1
    assert [bar.get_height() for bar in right.patches] == [0.25, 0.5, 0.75, 0.5]  # type: ignore[attr-defined]
    assert [label.get_text() for label in right.get_xticklabels()] == ["when sampled", "after\nthe step"]


def test_a_group_without_a_fork_is_refused_with_a_way_out() -> None:
    with pytest.raises(CountdownError, match="prompt 6 has no fork") as caught:
        fork_figure(data(fork=None))
    assert "--prompt" in (caught.value.hint or "")
