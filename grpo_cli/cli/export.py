"""`countdown export`: write a run's best model and model card to a folder, or upload them to a model hub."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer

from grpo_cli.cli.checks import resolve
from grpo_cli.cli.runs import best_step_of
from grpo_cli.core.config.resolve import restore
from grpo_cli.core.config.settings import values
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.names import HUB_ID
from grpo_cli.core.run.export import CARD, check_destination, export, license_of
from grpo_cli.core.run.folder import Run
from grpo_cli.core.run.models import model_source
from grpo_cli.ui import text
from grpo_cli.ui.card import CardFacts, model_card


def run(
    ctx: typer.Context,
    *,
    name: str,
    folder: Path,
    merge: bool,
    gguf: Literal["f16", "f32"] | None,
    push: str | None,
    overwrite: bool,
    config: Path | None,
) -> None:
    """Write the folder, print the path of each file, and upload it if `push` names a repository."""
    root = Path(resolve(ctx, config).settings.runs)
    chosen = Run.open(root, name)
    model_source(root, chosen.name)
    chosen.read_origin()
    check_destination(folder, overwrite=overwrite)
    if push is not None and not HUB_ID.fullmatch(push):
        raise CountdownError(f"`{push}` cannot name a repository", "use `owner/name`")
    is_adapter = chosen.adapter_path.is_dir()
    if merge and not is_adapter:
        raise CountdownError(f"run `{chosen.name}` has no adapter to merge", "leave out `--merge`")
    if gguf and is_adapter and not merge:
        raise CountdownError("a GGUF file holds a whole model, not an adapter", "add `--merge`")
    if gguf and find_spec("gguf") is None:
        raise CountdownError("`--gguf` needs the extra `gguf`", "pip install 'countdown-grpo[gguf]'")

    def convert(staged: Path) -> None:
        if gguf:
            from grpo_cli.core.model.gguf_write import write  # loads torch

            write(staged, staged / f"{chosen.name}-{gguf}.gguf", kind=gguf)

    is_adapter = is_adapter and not merge
    source, card = (chosen.adapter_path if is_adapter else chosen.model_path), card_of(chosen, is_adapter=is_adapter)
    for path in export(source, folder, card, overwrite=overwrite, convert=convert):
        print(path)
    if push is not None:
        from grpo_cli.core.run.hub import push as upload  # imports huggingface_hub; the only network access

        text.note(f"pushed to {upload(folder, push)}")


def _contamination(summary: Mapping[str, object]) -> str:
    if not summary:
        return "evaluation puzzles that were trained on are counted when the training ends"
    overlap, count = summary.get("overlap"), summary.get("puzzles")
    if not isinstance(overlap, int):
        return "which evaluation puzzles the base model was trained on is not known"
    return f"{overlap} of the {count} evaluation puzzles are known to have been trained on"


def write_card(chosen: Run) -> None:
    """Write the model card beside a run's best model, if there is one."""
    if chosen.model_path.is_dir():
        (chosen.model_path / CARD).write_text(card_of(chosen), encoding="utf-8")


def card_of(chosen: Run, *, is_adapter: bool = False) -> str:
    """The model card of a run's best model, or of its adapter."""
    settings = values(restore(chosen.read_config(), chosen.config_path).settings)
    base = str(settings["model.model"])
    facts = CardFacts(
        name=chosen.name,
        base_model=base,
        license=license_of(base),
        settings=settings,
        evaluations=chosen.evaluations(),
        best_step=best_step_of(chosen.metrics()),
        contamination=_contamination(chosen.read_summary() or {}),
        is_adapter=is_adapter,
    )
    return model_card(facts)
