from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import figures as plot
from grpo_cli.ui.figures import Curves

RUN = Curves(
    "run-1",
    reward=[(1, 0.2), (2, 0.4), (3, 0.9)],
    accuracy=[(1, 0.1), (2, 0.3), (3, 0.8)],
    kl=[(1, 0.0), (2, 0.01), (3, 0.05)],
    val=[(0, 0.3), (3, 0.6)],
)
OTHER = Curves("run-2", reward=[(5, 0.5)], accuracy=[(5, 0.6)], kl=[(5, 0.1)], val=[(0, 0.3)])


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def lines(figure: Figure, panel: int) -> list[tuple[str, list[tuple[float, float]]]]:
    """The label and the points of every line in a panel."""
    return [(str(line.get_label()), points(line)) for line in figure.axes[panel].lines]


def test_metrics_become_curves_over_their_own_steps() -> None:
    metrics = [
        {"step": 0, "val_accuracy": 0.3, "dev_accuracy": 0.9},
        {"step": 1, "reward": 0.2, "accuracy": 0.1, "kl": 0.0, "loss": 9.0},
        {"step": 2, "reward": 0.4, "accuracy": 0.3, "kl": float("nan"), "val_accuracy": 0.6, "dev_accuracy": 0.2},
    ]
    reward, accuracy, val = [(1, 0.2), (2, 0.4)], [(1, 0.1), (2, 0.3)], [(0, 0.3), (2, 0.6)]
    assert plot.from_metrics("run-1", metrics) == Curves("run-1", reward, accuracy, [(1, 0.0)], val, best=2)


@pytest.mark.parametrize("value", [1e308, -1e308, 1e101])
def test_values_too_large_for_an_axis_are_left_out(value: float) -> None:
    metrics = [{"step": step, "reward": value, "accuracy": 0.5, "kl": value} for step in (1, 2)]
    metrics.append({"step": 3, "reward": 1e99, "accuracy": 0.5, "kl": -1e99})
    curves = plot.from_metrics("run-1", metrics)
    assert (curves.reward, curves.kl) == ([(3, 1e99)], [(3, -1e99)])
    plot.training_figure([curves], 10).draw_without_rendering()
    plot.kl_figure([curves], 10).draw_without_rendering()


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([1, 2, 3, 4], 1, [1, 2, 3, 4]),
        ([1, 2, 3, 4], 2, [1, 2, 3, 4]),
        ([0, 3, 6, 0, 3], 3, [0, 3, 3, 3, 3]),
        ([0, 10, 20, 30, 40, 84], 10, [0, 10, 20, 36.8, pytest.approx(154 / 3), 84]),
        ([2, 4], 10, [2, 4]),
        ([], 10, []),
    ],
)
def test_a_moving_average_is_centred_and_ends_where_the_curve_ends(
    values: list[float], window: int, expected: list[float]
) -> None:
    assert plot.moving_average(values, window) == expected


def test_the_training_curve_has_accuracies_above_and_rewards_below() -> None:
    figure = plot.training_figure([RUN])
    assert lines(figure, 0) == [("train (sampled)", RUN.accuracy), ("val (greedy)", RUN.val)]
    (rewards,) = figure.axes[1].lines
    assert points(rewards) == RUN.reward
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "reward"]
    assert figure.axes[0].lines[1].get_marker() == "o"


def test_the_cells_of_a_suite_have_a_panel_of_their_own_and_the_saved_model_a_star() -> None:
    metrics = [
        {"step": 0, "val_accuracy": 0.3, "suite/val 3 one-shot": 0.3, "suite/train 4 natural": 0.2, "suite/x": 1.0},
        {
            "step": 5,
            "reward": 0.4,
            "val_accuracy": 0.7,
            "dev_accuracy": 0.7,
            "suite/val 3 one-shot": 0.7,
            "suite/train 4 natural": 0.1,
        },
        {
            "step": 9,
            "reward": 0.5,
            "val_accuracy": 0.7,
            "dev_accuracy": 0.7,
            "suite/val 3 one-shot": 0.5,
            "suite/train 4 natural": 0.2,
        },
    ]
    found = plot.from_metrics("run-1", metrics)
    assert found.cells == {
        "val 3 one-shot": [(0, 0.3), (5, 0.7), (9, 0.5)],
        "train 4 natural": [(0, 0.2), (5, 0.1), (9, 0.2)],
    }
    figure = plot.training_figure([found])
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "accuracy", "reward"]
    assert dict(lines(figure, 1)) == found.cells
    stars = [np.asarray(star.get_offsets()).tolist() for star in figure.axes[1].collections]
    assert sorted(stars) == [[[5.0, 0.1]], [[5.0, 0.7]]]
    one, other = figure.axes[1].lines
    assert one.get_color() != other.get_color() and one.get_marker() != other.get_marker()
    assert len(figure.legends[0].get_texts()) == 4


def test_the_star_is_the_step_that_dev_chose_and_the_legend_says_so() -> None:
    metrics = [
        {"step": 0, "val_accuracy": 0.3, "dev_accuracy": 0.3},
        {"step": 5, "reward": 0.4, "accuracy": 0.2, "val_accuracy": 0.8, "dev_accuracy": 0.7},
        {"step": 9, "reward": 0.5, "accuracy": 0.3, "val_accuracy": 0.7, "dev_accuracy": 0.9},
    ]
    figure = plot.training_figure([plot.from_metrics("run-1", metrics, temperature=0.7)], 10)
    stars = [np.asarray(star.get_offsets()).tolist() for star in figure.axes[0].collections]
    assert [[9.0, 0.7]] in stars and [[5.0, 0.8]] not in stars
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "train (sampled, T 0.7, centred mean of 9)",
        "val (greedy)",
        "best model, saved",
    ]
    figure.draw_without_rendering()
    low = figure.axes[-1].get_window_extent().y0
    assert figure.legends[0].get_window_extent().y1 < low  # below the panels, so it covers no data


def test_smoothing_draws_the_raw_curve_faintly_behind_its_average() -> None:
    raw, average, val = plot.training_figure([RUN], 3).axes[0].lines
    assert points(raw) == [(1, 0.1), (2, 0.3), (3, 0.8)]
    assert points(average) == [(1, 0.1), (2, pytest.approx(0.4)), (3, pytest.approx(0.8))]
    assert points(val) == [(0, 0.3), (3, 0.6)]
    assert raw.get_alpha() == 0.25
    assert average.get_alpha() is None
    assert raw.get_color() == average.get_color() != val.get_color()


def test_several_runs_are_overlaid_each_in_its_colour_with_a_legend() -> None:
    figure = plot.training_figure([RUN, OTHER])
    assert [label for label, _ in lines(figure, 0)] == [
        f"{curve} ({run})" for run in ("run-1", "run-2") for curve in ("train (sampled)", "val (greedy)")
    ]
    first, first_val, second, second_val = (line.get_color() for line in figure.axes[0].lines)
    assert first == first_val != second == second_val
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [label for label, _ in lines(figure, 0)]


def test_any_number_of_runs_can_be_told_apart() -> None:
    runs = [replace(RUN, name=f"run-{number}") for number in range(40)]
    panels = [
        *plot.training_figure(runs).axes,
        *plot.kl_figure(runs).axes,
    ]
    for axes in panels:
        looks = {
            (line.get_color(), str(vars(line)["_unscaled_dash_pattern"]), line.get_marker()) for line in axes.lines
        }
        assert len(looks) == len(axes.lines) >= 40


@pytest.mark.parametrize("name", ["$\\frac$", "_hidden", "x" * 300, "a\x1b\nb", "%d {x}"])
def test_any_name_can_be_drawn(name: str) -> None:
    curves = Curves(name, RUN.reward, RUN.accuracy, RUN.kl, [(0, 0.5)])
    figure = plot.training_figure([curves, RUN])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4


def test_curves_that_have_not_begun_are_drawn_empty() -> None:
    begun = plot.from_metrics("run-1", [{"step": 0, "val_accuracy": 0.3}])
    plot.training_figure([begun], 10).draw_without_rendering()
    assert plot.kl_figure([begun], 10).axes[0].lines[:] == []


# Writing


@pytest.mark.parametrize(("name", "start"), [("curve.png", b"\x89PNG\r\n"), ("curve.svg", b"<?xml")])
def test_the_suffix_chooses_the_format_and_equal_curves_write_equal_bytes(
    name: str, start: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    plot.save(plot.kl_figure([RUN, OTHER], 10), path)
    written = path.read_bytes()
    assert written.startswith(start)
    plot.save(plot.kl_figure([RUN, OTHER], 10), path)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["curve.pdf", "curve", "curve.PNG.txt"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CountdownError, match="not a PNG or SVG file"):
        plot.save(plot.kl_figure([RUN]), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
