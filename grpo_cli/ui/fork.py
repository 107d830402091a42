"""The figure of a fork: a group's completions, where better and worse ones part, and the probabilities of both ways.

Draws what `why.explained` returns. Imports matplotlib only when drawing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_cli.core.errors import CountdownError
from grpo_cli.ui.figures import COLOURS
from grpo_cli.ui.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHARACTERS = 66  # of a completion, from the fork on: its start and its end
SIDES = {"better": COLOURS[2], "worse": COLOURS[1]}
GREY = "#777777"


def fork_figure(data: Mapping[str, Any]) -> Figure:
    """The completions of a group on the left, the probabilities at their fork by stage on the right.

    Raises CountdownError if better and worse completions do not part.
    """
    from matplotlib.figure import Figure

    if not data["fork"]:
        raise CountdownError(
            f"prompt {data['prompt']} has no fork: its completions are equally good",
            "choose another `--step`, or leave out `--prompt` if it is given",
        )
    figure = Figure(figsize=(11, 0.8 + 0.42 * (len(data["completions"]) + 2)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
    _completions(left, data)
    _bars(right, data["fork"])
    return figure


def _completions(axes: Axes, data: Mapping[str, Any]) -> None:
    """Every completion from the fork on, those of each way together."""
    fork, rows = data["fork"], {row["sample"]: row for row in data["completions"]}
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(len(rows) + 0.6, -0.8))
    title = f"{len(rows)} completions of {_shown(data['problem'])}, from where they part"
    axes.set_title(title, loc="left", weight="bold", fontsize=11)
    axes.text(0, -0.2, f"… {_shown(fork['before'])}", family="monospace", fontsize=9, color=GREY)
    lines = [(side, sample) for side in SIDES for sample in fork[side]["samples"]]
    lines += [("", sample) for sample in rows if sample not in dict(map(reversed, lines))]  # type: ignore[arg-type]
    for place, (side, sample) in enumerate(lines, start=1):
        row, colour = rows[sample], SIDES.get(side, GREY)
        rest = fork[side]["endings"][str(sample)] if side else "(parts earlier, or goes another way)"
        mark = "✓" if row["reason"] == "correct" else "✗"
        axes.text(0, place, mark, color=colour, weight="bold", family="DejaVu Sans")
        axes.text(0.04, place, _shown(rest), family="monospace", fontsize=9, color=colour)
        axes.text(1, place, row["verdict"], fontsize=9, color=colour, ha="right")


def _bars(axes: Axes, fork: Mapping[str, Any]) -> None:
    """The probability of each way's next token, by stage."""
    width, stages = 0.38, fork["stages"]
    for offset, (side, colour) in zip((-width / 2, width / 2), SIDES.items(), strict=True):
        values = [fork[side]["probability"][name] for name in stages]
        places = [place + offset for place in range(len(stages))]
        bars = axes.bar(places, values, width, color=colour, label=f"{_shown(fork[side]['continues'])} ({side})")
        axes.bar_label(bars, fmt="{:.2f}", fontsize=9)
    axes.set_xticks(range(len(stages)), [name.replace(" the ", "\nthe ") for name in stages.values()], fontsize=9)
    axes.set(ylim=(0, 1.12), yticks=())
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("probability of the next token", loc="left", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False, fontsize=9)


def _shown(text: str) -> str:
    """Text in one line, shortened, with matplotlib's math characters escaped."""
    line = printable(text.strip("\n").replace("\n", " ⏎ "))
    half = CHARACTERS // 2 - 1
    return (line if len(line) <= CHARACTERS else f"{line[:half]}…{line[-half:]}").replace("$", r"\$")
