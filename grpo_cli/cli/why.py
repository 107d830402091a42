"""`countdown why`: explain a step of a training token by token, or diagnose a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo_cli.cli.models import import_libraries
from grpo_cli.cli.options import ConfigFile, Json, Overwrite, completion, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.ui import text

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Settings
    from grpo_cli.core.rl.replay import Replay
    from grpo_cli.core.run.folder import Run

SETTINGS = ("runs",)


Name = Annotated[
    str | None, typer.Argument(metavar="RUN", help="run; default: the newest", autocompletion=completion("run"))
]
Step = Annotated[int | None, typer.Option(min=1, help="step to take again and explain", metavar="<int>")]
Prompt = Annotated[
    int | None, typer.Option(min=0, help="group to show; default: the most instructive", metavar="<int>")
]
Sample = Annotated[
    int | None, typer.Option(min=0, help="completion of the group to show token by token", metavar="<int>")
]
Reveal = Annotated[bool, typer.Option("--reveal", help="name the bug that `train --break` planted")]
Losses = Annotated[bool, typer.Option("--losses", help="compare the gradient under every other loss")]
Html = Annotated[Path | None, typer.Option(help="write one HTML page too", metavar="<file>")]
Figure = Annotated[Path | None, typer.Option(help="draw the fork of completions: PNG or SVG", metavar="<file>")]


def why(
    ctx: typer.Context,
    run: Name = None,
    step: Step = None,
    prompt: Prompt = None,
    sample: Sample = None,
    reveal: Reveal = False,
    losses: Losses = False,
    html: Html = None,
    figure: Figure = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Explain why a run learns, or not: the whole run, or one step down to its tokens.

    Example: countdown why run-1 --step 2 --sample 0
    """
    from grpo_cli.core.run.folder import Run, at
    from grpo_cli.ui import why as show

    root = Path(resolve(ctx, config).settings.runs)
    chosen = Run.require_newest(root) if run is None else Run.open(root, run)
    settings = chosen.settings
    if reveal:
        _reveal(chosen, settings)
        return
    if step is None:
        asked = {"--prompt": prompt, "--sample": sample, "--html": html, "--figure": figure, "--losses": losses or None}
        if given := [name for name, value in asked.items() if value is not None]:
            again = f"countdown why {chosen.name}{at(chosen.path.parent)} --step 1"
            raise CountdownError(f"`{given[0]}` shows a part of one step", f"name it: `{again} ...`")
        _diagnose(chosen, settings, as_json=as_json)
        return
    _require_in_step(settings, prompt, sample)
    _require_outputs(chosen, html, figure, overwrite=overwrite)
    data = show.explained(_replayed(chosen, step, losses=losses), chosen.name, prompt=prompt, sample=sample)
    _write(data, html, figure)
    if as_json:
        text.json_object(data)
    else:
        show.show(data)
    for path in filter(None, (html, figure)):
        text.note(f"written: {path}")


def _require_outputs(run: Run, html: Path | None, figure: Path | None, *, overwrite: bool) -> None:
    """Raise CountdownError if the page or the figure cannot be written."""
    from grpo_cli.core.files import check_writable, require_ending
    from grpo_cli.core.run.folder import require_outside_runs
    from grpo_cli.ui.figures import require_drawable

    for path in filter(None, (html, figure)):
        require_outside_runs(path, own=run)
        check_writable(path, overwrite=overwrite)
    if html:
        require_ending(html, ".html", ".htm")
    if figure:
        require_drawable(figure)


def _write(data: dict[str, Any], html: Path | None, figure: Path | None) -> None:
    """Write the page and the figure of an explained step."""
    from grpo_cli.ui import why as show
    from grpo_cli.ui.figures import save
    from grpo_cli.ui.fork import fork_figure

    if html:
        show.write_page(data, html)
    if figure:
        save(fork_figure(data), figure)


def _reveal(run: Run, settings: Settings) -> None:
    """Print the planted bug; raises CountdownError if there is none."""
    import_libraries()
    from grpo_cli.core.rl.labs import BUGS, planted

    if (name := planted(settings)) is None:
        raise CountdownError(f"run `{run.name}` has no planted bug", "plant one with `countdown train --break mystery`")
    print(f"{name}: {BUGS[name].says}")


def _require_in_step(settings: Settings, prompt: int | None, sample: int | None) -> None:
    counts = (("--prompt", prompt, settings.train.batch_size), ("--sample", sample, settings.train.num_generations))
    for name, value, count in counts:
        if value is not None and value >= count:
            raise CountdownError(f"a step has no `{name} {value}`", f"choose one from 0 to {count - 1}")


def _diagnose(run: Run, settings: Settings, *, as_json: bool) -> None:
    from grpo_cli.core.rl.health import diagnose
    from grpo_cli.core.run.folder import at
    from grpo_cli.ui import why as show

    history = [line for line in run.metrics() if line["step"] > 0]
    if not history:
        raise CountdownError(f"run `{run.name}` has no steps yet", "wait for its first step, or resume it")
    train, groups = settings.train, run.groups(int(history[-1]["step"]))
    rows = sum(len(group["completions"]) for group in groups)
    whole = rows == train.batch_size * train.num_generations and train.num_inner_updates == 1
    findings = diagnose(
        history,
        settings.loss,
        groups=groups if whole else [],
        max_new_tokens=train.max_new_tokens,
        exact=settings.model.precision == "float32",
    )
    if train.broken != "none":
        again = f"countdown why {run.name} --reveal{at(run.path.parent)}"
        planted = f"a bug is planted on purpose: `--break {train.broken}`; `{again}` names it"
        findings.insert(0, {"name": "broken", "text": planted, "page": "docs/labs.md"})
    if as_json:
        text.json_object({"run": run.name, "steps": len(history), "findings": findings})
    else:
        show.diagnosis(findings, run.name)


def _replayed(run: Run, step: int, *, losses: bool) -> Replay:
    """The replay that the run keeps, or a new one; says first what must be computed."""
    import_libraries()
    from grpo_cli.core.rl.observer import Observer
    from grpo_cli.core.rl.replay import cached, plan, replay
    from grpo_cli.ui import tables

    planned = plan(run, step)
    if known := cached(run, step, losses=losses):
        return known
    start = f"the checkpoint of step {planned.start}" if planned.start else "the starting model"
    steps = text.counted(step - planned.start, "step")
    text.note(f"replaying from {start}: {steps}, which took {planned.seconds:,.0f} s in the training")
    with tables.progress("replaying: token", quiet=False) as advance:

        class Shown(Observer):
            def progress(self, phase: str, done: int, total: int) -> None:
                advance(done, total)

        return replay(run, planned, losses=losses, observer=Shown())
