"""The files that commands write about a run besides its own: curves and model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.rl.observer import Observer
from grpo_cli.core.task.prompts import prompt

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Plot, Train
    from grpo_cli.core.rl.observer import Validated
    from grpo_cli.core.run.folder import Run
    from grpo_cli.core.task.task import Message
    from grpo_cli.ui.account import Account
    from grpo_cli.ui.figures import Curves


class Artifacts(Observer):
    """Rewrites a run's curves and model card after each evaluation; a training never depends on them."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._run: Run | None = None

    def begin(self, run: Run, step: int) -> None:
        self._run = run

    def evaluated(self, result: Validated) -> None:
        if self._run and result.step:
            try:
                write_card(self._run)
                draw([run_curves(self._run)], self._run.path, self._run.settings.plot)
            except Exception as problem:  # whatever matplotlib raises
                self._report(f"the model card or the curves were not written: {problem}")


def run_curves(run: Run) -> Curves:
    """The curves of a run."""
    from grpo_cli.ui import figures

    train = run.settings.train
    return figures.from_metrics(_label(run, train), run.metrics(), temperature=train.temperature)


def account_of(run: Run) -> Account:
    """The data of a run for its report."""
    from grpo_cli.core.config.settings import values
    from grpo_cli.ui.account import Account

    settings, logs = run.settings, (run.metrics(), run.evaluations())
    return Account(_label(run, settings.train), *logs, values(settings), run.read_environment())


def _label(run: Run, train: Train) -> str:
    """The name of a run, which says if it is broken on purpose."""
    return run.name if train.broken == "none" else f"{run.name} (broken on purpose: {train.broken})"


def draw(curves: Sequence[Curves], folder: Path, style: Plot) -> list[Path]:
    """Draw both figures into a folder; returns their paths."""
    from grpo_cli.ui import figures

    paths, window = images(folder, style), style.averaged
    figures.save(figures.training_figure(curves, window), paths[0])
    figures.save(figures.kl_figure(curves, window), paths[1])
    return paths


def images(folder: Path, style: Plot) -> list[Path]:
    """The files of `draw`."""
    return [folder / f"{name}.{style.format}" for name in ("training_curve", "kl_divergence")]


def write_card(run: Run) -> None:
    """Write the model card beside a run's best model, if there is one."""
    from grpo_cli.core.run.export import CARD

    if run.model_path.is_dir():
        (run.model_path / CARD).write_text(card_of(run), encoding="utf-8")


def card_of(run: Run, *, is_adapter: bool = False) -> str:
    """The model card of a run's best model, or of its adapter."""
    from grpo_cli.core.config.settings import values
    from grpo_cli.core.metrics import best_step
    from grpo_cli.ui.card import model_card

    return model_card(
        run.name,
        values(run.settings),
        run.evaluations(),
        best_step=best_step(run.metrics()),
        contamination=_contamination(run.read_summary() or {}),
        is_adapter=is_adapter,
        messages=example_messages(run),
    )


def example_messages(run: Run) -> list[Message]:
    """The messages of one problem, as the run's model reads them; dots if the task is gone."""
    from grpo_cli.core.model.load import load_tokenizer
    from grpo_cli.core.model.templates import joined, strips_thoughts
    from grpo_cli.core.task.countdown import task_of
    from grpo_cli.core.task.data import generate

    settings, task = run.settings, run.settings.task
    try:
        if task.task == "countdown":
            puzzle = generate(1, numbers=task.numbers, rules=task.rules)[0]
            messages = prompt(puzzle, task.style, task.rules)
        else:
            chosen = task_of(settings)
            messages = chosen.prompt(chosen.problems("val", 0)[0], task.style)
    except CountdownError:
        return [{"role": "user", "content": "..."}]
    return joined(messages) if strips_thoughts(load_tokenizer(str(run.model_path))) else messages


def _contamination(summary: Mapping[str, object]) -> str:
    if not summary:
        return "evaluation puzzles that were trained on are counted when the training ends"
    overlap, count = summary.get("overlap"), summary.get("puzzles")
    if not isinstance(overlap, int):
        return "which evaluation puzzles the base model was trained on is not known"
    return f"{overlap} of the {count} evaluation puzzles are known to have been trained on"
