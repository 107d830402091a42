"""`countdown runs`: list the runs of a folder, a line each, or delete one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from grpo_cli.cli.options import ConfigFile, Json, completion, resolve
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.metrics import best_step, evaluations
from grpo_cli.ui import text

if TYPE_CHECKING:
    from grpo_cli.core.run.folder import Run

SETTINGS = ("runs",)
UNLISTED = ("runs", "preset", "model.model", "train.num_iterations")  # in columns of their own, or places

ORDERS = {"accuracy": "best_accuracy", "step": "step", "time": "seconds"}


def runs(
    ctx: typer.Context,
    delete: Annotated[
        list[str] | None,
        typer.Option(
            "--delete", help="run to delete; may be repeated", metavar="<name>", autocompletion=completion("run")
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete without asking")] = False,
    sort: Annotated[
        Literal["name", "accuracy", "step", "time"], typer.Option(help="order; the last three put the largest first")
    ] = "name",
    where: Annotated[
        list[str] | None,
        typer.Option(help="list only runs with this setting; may be repeated", metavar="<setting=value>"),
    ] = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """List the runs: model, steps, accuracy of base and best model, time, settings that differ from the preset.

    Runs that differ only in their seed are summed up below. Example: countdown runs --sort accuracy --where seed=1
    """
    from grpo_cli.core.run.folder import Run, at, list_runs
    from grpo_cli.ui import tables

    root = Path(resolve(ctx, config).settings.runs)
    if delete:
        _delete([Run.open(root, name) for name in delete], yes=yes)
        return
    asked = list(map(_condition, where or []))
    described = [_describe(entry) for entry in list_runs(root)]
    shown = [(row, own) for row, own in described if all(own.get(key) == value for key, value in asked)]
    if sort != "name":
        shown.sort(key=lambda one: -float(cast(float, one[0].get(ORDERS[sort]) or 0)))
    rows, groups = [row for row, _ in shown], _seeds(shown)
    if as_json:
        text.json_object({"runs": rows, "groups": groups})
    elif rows:
        tables.runs(rows, groups)
    elif described:
        text.note("no run has these settings")
    else:
        text.note(f"no runs in `{root}`; train one with `countdown train{at(root)}`")


def _condition(text: str) -> tuple[str, object]:
    """`model=builtin` -> (`model.model`, `builtin`)."""
    from grpo_cli.core.config.names import nearest
    from grpo_cli.core.config.resolve import flag, typed
    from grpo_cli.core.config.settings import FIELDS

    name, given, value = text.partition("=")
    names = {key: (key, key.rpartition(".")[2], flag(key).removeprefix("--")) for key in FIELDS}
    key = next((key for key, own in names.items() if name in own), None)
    if key is None or not given:
        close = key or nearest(name, [own for _, own, _ in names.values()])
        hint = f"did you mean `--where {close}={value}`?" if close and value else "write `--where seed=1`"
        raise CountdownError(f"`--where {text}` is not a setting with its value", hint)
    return key, typed(key, value)


def _seeds(shown: Sequence[tuple[dict[str, object], Mapping[str, object]]]) -> list[dict[str, object]]:
    """Groups of finished runs that differ only in their seed, one a seed: names, seeds, mean and range of the best."""
    groups: dict[str, dict[object, tuple[str, object, float]]] = {}
    for row, settings in shown:
        if isinstance(best := row.get("best_accuracy"), float) and row["step"] == row["num_iterations"]:
            same = json.dumps({key: value for key, value in settings.items() if key not in ("train.seed", "runs")})
            seed = settings["train.seed"]
            groups.setdefault(same, {}).setdefault(seed, (str(row["run"]), seed, best))
    several = [list(zip(*group.values(), strict=True)) for group in groups.values() if len(group) > 1]
    return [
        {"runs": names, "seeds": seeds, "mean": sum(best) / len(best), "range": [min(best), max(best)]}
        for names, seeds, best in several
    ]


def _describe(entry: Run) -> tuple[dict[str, object], Mapping[str, object]]:
    """One run as plain data, and its settings; what cannot be read is named in `error` instead."""
    from grpo_cli.core.config.settings import values

    try:
        settings = values(entry.settings)
        metrics, evaluation = entry.metrics(), next(iter(entry.evaluations().values()), {})
    except CountdownError as problem:
        return {"run": entry.name, "error": problem.message}, {}
    except OSError as problem:
        return {"run": entry.name, "error": f"cannot read `{problem.filename}`: {problem.strerror}"}, {}
    evaluated, chosen = evaluations(metrics), best_step(metrics)
    row = {
        "run": entry.name,
        "model": settings["model.model"],
        "step": int(metrics[-1]["step"]) if metrics else 0,
        "num_iterations": settings["train.num_iterations"],
        "base_accuracy": evaluated.get(0, {}).get("val_accuracy"),
        "best_accuracy": evaluated[chosen]["val_accuracy"] if chosen else None,
        "interval": list(evaluation[chosen].interval) if chosen in evaluation and chosen else None,
        "best_step": chosen or None,
        "seconds": sum(line.get("time/total", 0.0) + line.get("time/eval", 0.0) for line in metrics),
        "settings": _changed(settings),
    }
    return row, settings


def _changed(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that differ from those of the run's preset."""
    from grpo_cli.core.config.resolve import resolve
    from grpo_cli.core.config.settings import values

    try:
        from_preset = values(resolve(flags={"preset": settings["preset"]}, has_cuda=lambda: False).settings)
    except CountdownError:  # a preset of a settings file that is elsewhere
        return {}
    differing = {key: value for key, value in settings.items() if from_preset.get(key, value) not in (value, "auto")}
    return {key: value for key, value in differing.items() if key not in UNLISTED}


def _delete(chosen: list[Run], *, yes: bool) -> None:
    names = ", ".join(entry.name for entry in chosen)
    if not yes:
        typer.confirm(f"delete {names}, checkpoints and models included?", abort=True, err=True)
    for entry in chosen:
        entry.delete()
        text.note(f"deleted run {entry.name}")
