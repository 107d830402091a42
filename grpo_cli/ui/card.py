"""The model card of a run, in Markdown: base model, settings, data, results, usage. `card.md.j2` has its text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Self

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from grpo_cli import __version__
from grpo_cli.core.config.resolve import defaults
from grpo_cli.core.config.settings import panel
from grpo_cli.core.run.export import license_of
from grpo_cli.core.run.logs import Evaluated
from grpo_cli.ui.text import interval, percent, printable

TEMPLATE = "card.md.j2"
HYPERPARAMETERS = (
    *(f"train.{name}" for name in ("num_iterations", "batch_size", "num_generations", "max_new_tokens")),
    *(f"train.{name}" for name in ("temperature", "learning_rate", "num_inner_updates", "clip_grad_norm")),
    *(f"loss.{name}" for name in ("loss_type", "beta", "epsilon", "epsilon_high", "scale_rewards")),
    *("model.precision", "train.optimizer", "train.seed"),
)


class _Code(str):
    """A literal of JSON and Python alike, shown as it is."""

    @classmethod
    def of(cls, value: object, indent: int | None = None) -> Self:
        return cls(json.dumps(value, indent=indent).replace("`", "\\u0060"))  # it cannot close the block of code


def model_card(
    name: str,
    settings: Mapping[str, object],
    evaluations: Mapping[str, Mapping[int, Evaluated]],
    *,
    best_step: int = 0,
    contamination: str = "",
    is_adapter: bool = False,
    messages: Sequence[Mapping[str, str]] = ({"role": "user", "content": "..."},),
) -> str:
    """The card as Markdown with the YAML header of model hubs; `settings` by key, `messages` an example prompt.

    All text of a run is escaped.
    """
    base = str(settings["model.model"])
    header = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["countdown", "grpo", "rlvr"],
        license=license_of(base),
        base_model=base if "/" in base and not Path(base).exists() else None,  # a hub id
    )
    start = "after the warm start" if settings["train.warm_start"] else "base"
    rows = [
        (cell, model, steps[step])
        for cell, steps in evaluations.items()
        for model, step in ((start, 0), ("trained", best_step))
        if step in steps
    ]
    page = _template().render(
        name=name,
        base_model=base,
        license=header.license,
        settings=settings,
        contamination=contamination,
        is_adapter=is_adapter,
        evaluated=rows,
        hyperparameters=[*HYPERPARAMETERS, *_changed(settings)],
        version=__version__,
        messages=_Code.of(messages, indent=4),
        base_name=_Code.of(base),
        percent=percent,
        interval=interval,
    )
    return f"---\n{header.to_yaml()}\n---\n\n{page}"


def _changed(settings: Mapping[str, object]) -> list[str]:
    """Other settings of what was learned from, and how, that differ from the defaults."""
    usual = defaults()
    return [
        key
        for key, value in settings.items()
        if key.startswith(("train.", "loss.", "reward.")) and key not in HYPERPARAMETERS
        if panel(key) in ("Loss", "Optimization", "Sampling") and value != usual[key]
    ]


@cache
def _template() -> Template:
    """Compiled once: a training writes a card with every new best model."""
    pages = Environment(
        loader=PackageLoader("grpo_cli", "ui"),
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return pages.get_template(TEMPLATE)


def _escaped(value: object) -> str:
    return value if isinstance(value, _Code) else printable(str(value)).replace("|", "\\|").replace("`", "'")
