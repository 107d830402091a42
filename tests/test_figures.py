import json
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
    val={"val": [(0, 0.3), (3, 0.6)]},
)
OTHER = Curves("run-2", reward=[(5, 0.5)], accuracy=[(5, 0.6)], kl=[(5, 0.1)], val={"val": [(0, 0.3)]})
ORIGINAL = {
    "rewards_avg": [0.1, 0.2, 0.3],
    "train_accuracies_avg": [0.0, 0.5, 1],
    "val_accuracies_avg": [0.25, 0.5, 0.75],
    "kl_avg": [0.0, 0.01, 0.02],
}


def write(folder: Path, text: str, name: str = "grpo_metrics.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def lines(figure: Figure, panel: int) -> list[tuple[str, list[tuple[float, float]]]]:
    """The label and the points of every line in a panel."""
    return [(str(line.get_label()), points(line)) for line in figure.axes[panel].lines]


# Reading


def test_metrics_become_curves_over_their_own_steps() -> None:
    metrics = [
        {"step": 0, "val_accuracy": 0.3},
        {"step": 1, "reward": 0.2, "accuracy": 0.1, "kl": 0.0, "loss": 9.0},
        {"step": 2, "reward": 0.4, "accuracy": 0.3, "kl": float("nan"), "val_accuracy": 0.6},
    ]
    assert plot.from_metrics("run-1", metrics) == Curves(
        "run-1",
        reward=[(1, 0.2), (2, 0.4)],
        accuracy=[(1, 0.1), (2, 0.3)],
        kl=[(1, 0.0)],
        val={"val": [(0, 0.3), (2, 0.6)]},
        best=2,
    )


def test_a_file_of_metrics_is_read_line_by_line(tmp_path: Path) -> None:
    rows = [{"step": 0, "val_accuracy": 0.5}, {"step": 1, "reward": 1, "accuracy": 0.5, "kl": 0.0}]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n", "metrics.jsonl")
    assert plot.load(path) == Curves("metrics", [(1, 1.0)], [(1, 0.5)], [(1, 0.0)], {"val": [(0, 0.5)]})


def test_a_file_of_one_line_of_metrics_is_not_taken_for_the_originals(tmp_path: Path) -> None:
    path = write(tmp_path, '{"step": 4, "reward": 0.5}', "metrics.jsonl")
    assert plot.load(path).reward == [(4, 0.5)]


def test_the_originals_lists_hold_one_value_for_ten_steps(tmp_path: Path) -> None:
    assert plot.load(write(tmp_path, json.dumps(ORIGINAL))) == Curves(
        "grpo_metrics",
        reward=[(0, 0.1), (10, 0.2), (20, 0.3)],
        accuracy=[(0, 0.0), (10, 0.5), (20, 1.0)],
        kl=[(0, 0.0), (10, 0.01), (20, 0.02)],
        val={"val": [(0, 0.25), (10, 0.5), (20, 0.75)]},
    )


def test_the_originals_val_lists_may_be_named_and_of_other_lengths(tmp_path: Path) -> None:
    named = {**ORIGINAL, "val_accuracies_avg": {"3num_os": [0.25, 0.5], "natural": [0.125], "empty": []}}
    assert plot.load(write(tmp_path, json.dumps(named))).val == {
        "val 3num_os": [(0, 0.25), (10, 0.5)],
        "val natural": [(0, 0.125)],
        "val empty": [],
    }


def test_the_originals_lists_may_be_missing_or_hold_nan(tmp_path: Path) -> None:
    curves = plot.load(write(tmp_path, '{"kl_avg": [NaN, 0.5, Infinity, 0.25]}'))
    assert curves == Curves("grpo_metrics", [], [], [(10, 0.5), (30, 0.25)], {"val": []})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`{path}` holds no metrics to plot"),
        ('{"step": 1, "loss": 0.5}', "`{path}` holds no metrics to plot"),
        ('{"rewards_avg": []}', "`{path}` holds no metrics to plot"),
        ("[1, 2]", "`{path}`, line 1: not a line of metrics"),
        ('{"accuracy": 0.5}', "`{path}`, line 1: not a line of metrics"),
        ('{"step": 1.5}', "`{path}`, line 1: not a line of metrics"),
        ('{"step": true}', "`{path}`, line 1: `step` is not a number"),
        ('{"step": 1, "reward": 0.5}\n{"step": 2, "rew', "`{path}`, line 2: not a line of metrics"),
        ('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": "high"}', "`{path}`, line 2: `reward` is not a number"),
        ('{"step": 1, "reward": false}', "`{path}`, line 1: `reward` is not a number"),
        ('{"rewards_avg": 0.5}', "`{path}`: `rewards_avg` is not a list"),
        ('{"kl_avg": [0.5, null]}', "`{path}`: `kl_avg[1]` is not a number"),
        ('{"val_accuracies_avg": {"a": 1}}', "`{path}`: `val_accuracies_avg` is not a list"),
        ('{"kl_avg": [1' + "0" * 400 + "]}", "`{path}`: `kl_avg[0]` is too large"),
        ('{"step": 1' + "0" * 400 + ', "reward": 0.5}', "`{path}`, line 1: `step` is too large"),
        ('{"step": 1' + "0" * 16 + ', "reward": 0.5}', "`{path}`, line 1: `step` is too large"),
        ('{"step": 1, "reward": 1e308, "kl": -1e308}', "`{path}` holds no metrics to plot"),
        ("[" * 100_000, "`{path}`, line 1: not a line of metrics"),
    ],
)
def test_a_file_that_cannot_be_plotted_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CountdownError) as refused:
        plot.load(path)
    assert refused.value.message == message.format(path=path)
    assert refused.value.exit_code == 2


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CountdownError, match="is not UTF-8 text"):
        plot.load(binary)
    for path, said in ((tmp_path, "is not a regular file"), (tmp_path / "missing.json", "cannot read")):
        with pytest.raises(CountdownError, match=said):
            plot.load(path)


# Drawing


@pytest.mark.parametrize("value", [1e308, -1e308, 1e101])
def test_values_too_large_for_an_axis_are_left_out(value: float, tmp_path: Path) -> None:
    metrics = [{"step": step, "reward": value, "accuracy": 0.5, "kl": value} for step in (1, 2)]
    metrics.append({"step": 3, "reward": 1e99, "accuracy": 0.5, "kl": -1e99})
    curves = plot.from_metrics("run-1", metrics)
    assert (curves.reward, curves.kl) == ([(3, 1e99)], [(3, -1e99)])
    plot.training_curve([curves], tmp_path / "training.png", smooth=True)
    plot.kl_curve([curves], tmp_path / "kl.png", smooth=True)


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
    figure = plot.training_figure([RUN], smooth=False, window=10)
    assert lines(figure, 0) == [("train (sampled)", RUN.accuracy), ("val (greedy)", RUN.val["val"])]
    (rewards,) = figure.axes[1].lines
    assert points(rewards) == RUN.reward
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "reward"]
    assert figure.axes[0].lines[1].get_marker() == "o"


def test_the_cells_of_a_suite_have_a_panel_of_their_own_and_the_saved_model_a_star() -> None:
    metrics = [
        {"step": 0, "val_accuracy": 0.3, "suite/val 3 one-shot": 0.3, "suite/train 4 natural": 0.2, "suite/x": 1.0},
        {"step": 5, "reward": 0.4, "val_accuracy": 0.7, "suite/val 3 one-shot": 0.7, "suite/train 4 natural": 0.1},
        {"step": 9, "reward": 0.5, "val_accuracy": 0.7, "suite/val 3 one-shot": 0.5, "suite/train 4 natural": 0.2},
    ]
    found = plot.from_metrics("run-1", metrics)
    assert found.cells == {
        "val 3 one-shot": [(0, 0.3), (5, 0.7), (9, 0.5)],
        "train 4 natural": [(0, 0.2), (5, 0.1), (9, 0.2)],
    }
    figure = plot.training_figure([found], smooth=False, window=10)
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
    figure = plot.training_figure([plot.from_metrics("run-1", metrics, temperature=0.7)], smooth=True, window=10)
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
    raw, average, val = plot.training_figure([RUN], smooth=True, window=3).axes[0].lines
    assert points(raw) == [(1, 0.1), (2, 0.3), (3, 0.8)]
    assert points(average) == [(1, 0.1), (2, pytest.approx(0.4)), (3, pytest.approx(0.8))]
    assert points(val) == [(0, 0.3), (3, 0.6)]
    assert raw.get_alpha() == 0.25
    assert average.get_alpha() is None
    assert raw.get_color() == average.get_color() != val.get_color()


def test_several_runs_are_overlaid_each_in_its_colour_with_a_legend() -> None:
    figure = plot.training_figure([RUN, OTHER], smooth=False, window=10)
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
        *plot.training_figure(runs, smooth=False, window=10).axes,
        *plot.kl_figure(runs, smooth=False, window=10).axes,
    ]
    for axes in panels:
        looks = {
            (line.get_color(), str(vars(line)["_unscaled_dash_pattern"]), line.get_marker()) for line in axes.lines
        }
        assert len(looks) == len(axes.lines) >= 40


@pytest.mark.parametrize("name", ["$\\frac$", "_hidden", "x" * 300, "a\x1b\nb", "%d {x}"])
def test_any_name_can_be_drawn(name: str) -> None:
    curves = Curves(name, RUN.reward, RUN.accuracy, RUN.kl, {f"val {name}": [(0, 0.5)]})
    figure = plot.training_figure([curves, RUN], smooth=False, window=10)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4


def test_curves_that_have_not_begun_are_drawn_empty(tmp_path: Path) -> None:
    begun = plot.from_metrics("run-1", [{"step": 0, "val_accuracy": 0.3}])
    plot.training_curve([begun], tmp_path / "training.png", smooth=True)
    plot.kl_curve([begun], tmp_path / "kl.png", smooth=True)
    assert plot.kl_figure([begun], smooth=True, window=10).axes[0].lines[:] == []


# Writing


@pytest.mark.parametrize(("name", "start"), [("curve.png", b"\x89PNG\r\n"), ("curve.svg", b"<?xml")])
def test_the_suffix_chooses_the_format_and_equal_curves_write_equal_bytes(
    name: str, start: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    plot.kl_curve([RUN, OTHER], path, smooth=True)
    written = path.read_bytes()
    assert written.startswith(start)
    plot.kl_curve([RUN, OTHER], path, smooth=True)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["curve.pdf", "curve", "curve.PNG.txt"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CountdownError, match="not a PNG or SVG file"):
        plot.kl_curve([RUN], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CountdownError, match=r"cannot write .*: No such file or directory"):
        plot.kl_curve([RUN], tmp_path / "missing" / "curve.png")
