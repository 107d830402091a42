"""The registry of metrics, and its readers."""

import re
from pathlib import Path
from typing import get_args

import pytest

from grpo_cli.core.metrics import CHEATS, METRICS, metric
from grpo_cli.core.task.scoring import Cheat

PAGE = Path(__file__).parent.parent / "docs" / "api.md"


def test_docs_list_every_metric_with_its_meaning_and_unit() -> None:
    section = PAGE.read_text("utf-8").partition("## Metrics")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    assert rows == [(one.name, one.meaning, one.unit) for one in METRICS]


@pytest.mark.parametrize(
    ("name", "declared"),
    [("time/total", "time/total"), ("time/wait", "time/"), ("suite/val 3 one-shot", "suite/"), ("kl", "kl")],
)
def test_a_metric_has_its_own_declaration_or_that_of_its_family(name: str, declared: str) -> None:
    assert metric(name).name == declared


def test_an_undeclared_metric_is_an_error() -> None:
    with pytest.raises(KeyError):
        metric("perplexity")


def test_every_kind_of_cheat_is_described() -> None:
    assert set(CHEATS) == set(get_args(Cheat))
