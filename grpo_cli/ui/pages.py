"""HTML pages from the templates of this folder: every value is made printable and escaped."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from grpo_cli import __version__
from grpo_cli.ui.text import EXCERPT_CHARACTERS, percent, printable, thousandths

STYLE = Path(__file__).with_name("report.css")


def render(name: str, /, **facts: object) -> str:
    """The page of a template; it also gets the style sheet and the version."""
    return _environment().get_template(name).render(facts, style=Markup(STYLE.read_text("utf-8")), version=__version__)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("grpo_cli", "ui"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "share": "{:.2%}".format,  # as CSS has it
        "comma": "{:,}".format,
        "thousandths": thousandths,
        "cut": lambda text, limit: printable(text, limit=limit),
        "block": lambda text: Markup(escape(printable(text.strip("\n"), keep_newlines=True, limit=EXCERPT_CHARACTERS))),
        "parts": lambda key: re.split(r"(?<=[._])", key),  # a long key may wrap between them
    }
    return environment
