"""`countdown plot`: draw the curves of runs or metrics files, and write their report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_cli.cli.artifacts import account_of, draw, images, run_curves
from grpo_cli.cli.options import ConfigFile, Overwrite, completion, require_package, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import check_writable, write

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Plot
    from grpo_cli.core.run.folder import Run
    from grpo_cli.ui.figures import Curves

SETTINGS = ("runs", "plot")
MOST_CHARACTERS = 64  # in a folder name joined from runs' names


def plot(
    ctx: typer.Context,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="runs, or metrics files; default: the newest run", autocompletion=completion("run")
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="output folder; default: the run's, or plots/ for several runs", metavar="<folder>"),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="write report.html too, one page about the run")] = False,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
) -> None:
    """Draw the training curve and the KL curve, of one run or of several overlaid.

    Example: countdown plot first second --smooth --report
    """
    from grpo_cli.core.run.folder import Run, require_outside_runs
    from grpo_cli.ui import tables

    settings = resolve(ctx, config).settings
    root, style = Path(settings.runs), settings.plot
    names = runs or [Run.require_newest(root).name]
    sources = [_source(root, name, report=report) for name in names]
    if report and not all(isinstance(source, Run) for source in sources):
        raise CountdownError("a report is about runs", "leave out `--report`, or name runs")
    curves = [_curves(source) for source in sources]
    for name, drawn in zip(names, curves, strict=True):
        if drawn.is_empty:
            raise CountdownError(f"`{name}` has no metrics to plot yet", "wait for its first step, or resume it")
    single = sources[0] if len(sources) == 1 and isinstance(sources[0], Run) else None
    own = single.path if single else None
    require_package("matplotlib")
    folder = out or own or _folder_for(sources)
    require_outside_runs(folder, own=single)
    page = folder / "report.html"
    for path in [*images(folder, style), *([page] * report)]:
        check_writable(path, overwrite=overwrite or folder == own)  # a run's own images may be replaced
    if report:
        _write_report([source for source in sources if isinstance(source, Run)], page, style)
    for path in [*draw(curves, folder, style), *([page] * report)]:
        print(path)
    tables.sparklines(curves)


def _folder_for(sources: Sequence[Run | Path]) -> Path:
    """Make `plots/first+second`, the folder for plots of several runs; a single metrics file is drawn in `.`."""
    from grpo_cli.core.run.folder import Run

    if len(sources) == 1:
        return Path(".")
    names = [source.name if isinstance(source, Run) else source.stem for source in sources]
    label = "+".join(names)
    folder = Path("plots") / (label if len(label) <= MOST_CHARACTERS else f"{names[0][:40]}+{len(names) - 1}-others")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CountdownError(f"cannot create `{folder}`: {error.strerror}", "choose a folder with `--out`") from None
    return folder


def _source(root: Path, name: str, *, report: bool) -> Run | Path:
    """The run of this name, or the metrics file at this path."""
    from grpo_cli.core.run.folder import at, find_run, suggestion

    if (run := find_run(root, name)) is None and not os.path.exists(name):
        hint = suggestion(root, name) or f"list runs with `countdown runs{at(root)}`"
        hint += "" if report or hint.endswith("?") else ", or name a file of metrics"
        raise CountdownError(f"no run `{name}` in `{root}`, and no such file", hint)
    return run or Path(name)


def _curves(source: Run | Path) -> Curves:
    """The curves of a run, or of a file of metrics, named by the file."""
    from grpo_cli.core.run.logs import Log, numbers
    from grpo_cli.ui import figures

    if isinstance(source, Path):
        return figures.from_metrics(source.stem, Log(source, numbers).read())
    return run_curves(source)


def _write_report(runs: Sequence[Run], path: Path, style: Plot) -> None:
    from grpo_cli.core.config.resolve import defaults
    from grpo_cli.ui import report

    page = report.page([account_of(run) for run in runs], defaults=defaults(), window=style.averaged)
    write(path, page.encode())
