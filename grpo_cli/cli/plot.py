"""`countdown plot`: draw the curves of runs or metrics files, and write their report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from grpo_cli.cli.checks import require_package, resolve
from grpo_cli.core.config.resolve import defaults, restore
from grpo_cli.core.config.settings import Plot, values
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import check_writable
from grpo_cli.core.run.folder import Run, at, find_run, require_outside_runs, suggestion
from grpo_cli.ui import figures, report, tables
from grpo_cli.ui.account import Account
from grpo_cli.ui.figures import Curves

MOST_CHARACTERS = 64  # in a folder name joined from runs' names


def run(
    ctx: typer.Context, *, runs: list[str] | None, out: Path | None, report: bool, overwrite: bool, config: Path | None
) -> None:
    """Draw both figures of the runs and, with `report`, write report.html beside them."""
    settings = resolve(ctx, config).settings
    root, style = Path(settings.runs), settings.plot
    newest = Run.newest(root)
    names = runs or ([newest.name] if newest else [])
    if not names:
        raise CountdownError(
            f"no run in `{root}` yet", f"train one with `countdown train{at(root)}`, or name a metrics file"
        )
    sources = [_source(root, name) for name in names]
    curves = [run_curves(source) if isinstance(source, Run) else figures.load(source) for source in sources]
    for name, drawn in zip(names, curves, strict=True):
        if drawn.is_empty:
            raise CountdownError(f"`{name}` has no metrics to plot yet", "wait for its first step, or resume it")
    single = sources[0] if len(sources) == 1 and isinstance(sources[0], Run) else None
    own = single.path if single else None
    require_package("matplotlib")
    folder = out or own or _folder_for(sources)
    require_outside_runs(folder, own=single)
    page = folder / "report.html"
    for path in [*_images(folder, style), *([page] * report)]:
        check_writable(path, overwrite=overwrite or folder == own)  # a run's own images may be replaced
    if report:
        _write_report([_account(source, drawn) for source, drawn in zip(sources, curves, strict=True)], page, style)
    for path in [*draw(curves, folder, style), *([page] * report)]:
        print(path)
    tables.sparklines(curves)


def _folder_for(sources: Sequence[Run | Path]) -> Path:
    """Make `plots/first+second`, the folder for plots of several runs; a single metrics file is drawn in `.`."""
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


def run_curves(run: Run) -> Curves:
    """The curves of a run."""
    return figures.from_metrics(run.name, run.metrics())


def draw(curves: Sequence[Curves], folder: Path, style: Plot) -> list[Path]:
    """Draw both figures into a folder; returns their paths."""
    paths = _images(folder, style)
    for path, drawer in zip(paths, (figures.training_curve, figures.kl_curve), strict=True):
        drawer(curves, path, smooth=style.smooth, window=style.window)
    return paths


def _images(folder: Path, style: Plot) -> list[Path]:
    return [folder / f"{name}.{style.format}" for name in ("training_curve", "kl_divergence")]


def _source(root: Path, name: str) -> Run | Path:
    """The run of this name, or the metrics file at this path."""
    if (run := find_run(root, name)) is None and not os.path.exists(name):
        hint = suggestion(root, name) or f"list runs with `countdown runs{at(root)}`, or name a file of metrics"
        raise CountdownError(f"no run `{name}` in `{root}`, and no such file", hint)
    return run or Path(name)


def _account(source: Run | Path, curves: Curves) -> Account:
    """Collect the report data of a run or a metrics file."""
    if isinstance(source, Path):
        return Account(curves)
    return Account(
        curves,
        source.metrics(),
        source.evaluations(),
        source.samples(),
        values(restore(source.read_config(), source.config_path).settings),
        source.read_summary(),
        source.read_environment(),
    )


def _write_report(accounts: Sequence[Account], path: Path, style: Plot) -> None:
    report.write(report.page(accounts, defaults=defaults(), smooth=style.smooth, window=style.window), path)
