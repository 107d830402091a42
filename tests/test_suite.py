"""Cells and their means."""

import pytest

from grpo_cli.core.task.suite import CELLS, Cell, cell, weighted_mean


def test_a_cell_is_known_by_its_name() -> None:
    assert cell("  val  4 zero-shot ") == Cell("val", 4, "zero-shot")
    assert all(cell(name) == one and one.name == name for name, one in CELLS.items())
    assert len(CELLS) == 3 * 5 * 3


@pytest.mark.parametrize(
    "text", ["", "val", "val 3", "val 3 oneshot", "test 3 one-shot", "val 7 one-shot", "val three"]
)
def test_what_names_no_cell_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a cell"):
        cell(text)


def test_a_cell_that_is_mistyped_is_told_its_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean `val 3 one-shot`"):
        cell("val 3 oneshot")


def test_a_weighted_mean_worked_out_by_hand() -> None:
    assert weighted_mean({"a": 0.5, "b": 1.0, "c": 0.0}, {"a": 3.0, "b": 1.0, "c": 0.0}) == 0.625
    assert weighted_mean({"a": 0.25, "b": 0.75, "more": 9.0}, {"a": 1.0, "b": 1.0}) == 0.5
    assert weighted_mean({"a": 0.5, "b": 1.0}, {"a": 1e308, "b": 1e308}) == 0.75
