"""A study: the same training under several conditions, each with several seeds, and what differs from the first one.

[study]                      # optional
seeds = 5                    # 0 to 4
step = 8                     # the evaluation that is compared; default: the last

[train]                      # settings of all conditions, as in config.toml
num_iterations = 8

[conditions.baseline]
[conditions.grpo.loss]
loss_type = "grpo"
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo_cli.core.config.resolve import read_settings, read_toml
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.evals.statistics import SIGNIFICANT, bootstrap, holm, paired, significant, student_quantile

POWER = 0.8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


class Design(BaseModel):
    """The table `[study]`. `spread`: assumed standard deviation of a difference between seeds, until it is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seeds: Annotated[int, Field(ge=2, le=100)] = 5
    first_seed: Annotated[int, Field(ge=0, lt=2**32 - 100)] = 0
    step: Annotated[int, Field(ge=1)] | None = None
    spread: Annotated[float, Field(gt=0, lt=1)] = 0.02


@dataclass(frozen=True)
class Study:
    """A study file. `conditions`: the settings of each by key (`loss.beta`), those of all included; the first is the
    baseline."""

    name: str
    design: Design
    conditions: Mapping[str, Mapping[str, object]]

    @property
    def seeds(self) -> range:
        return range(self.design.first_seed, self.design.first_seed + self.design.seeds)

    def run_name(self, condition: str, seed: int) -> str:
        return f"{self.name}-{condition}-{seed}"


@dataclass(frozen=True)
class Difference:
    """A condition less the baseline: mean accuracies over seeds, the difference's 95 % interval over seeds, and the
    p-value corrected for the number of conditions (Holm 1979)."""

    condition: str
    accuracy: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    p_value: float

    @property
    def verdict(self) -> str:
        if not significant(self.p_value):
            return "can't be told"
        return "better" if self.difference > 0 else "worse"

    def record(self) -> dict[str, object]:
        return asdict(self) | {"verdict": self.verdict}


def read_study(path: Path) -> Study:
    """The study in a TOML file; raises CountdownError for a table or setting that it cannot have."""
    document = read_toml(path)
    tables = document.pop("conditions", {})
    try:
        design = Design.model_validate(document.pop("study", {}))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, ("study", *problem["loc"])))
        raise CountdownError(f"`{place}` in `{path}`: {problem['msg'].lower()}", "see docs/evaluation.md") from None
    shared = read_settings(document, str(path))
    conditions = {}
    for name, table in tables.items() if isinstance(tables, dict) else ():
        if not _NAME.fullmatch(name):
            raise CountdownError(
                f"`{name}` in `{path}` cannot name a condition", "use letters, digits, dots, dashes and underscores"
            )
        if not isinstance(table, dict):
            raise CountdownError(f"`conditions.{name}` in `{path}` must be a table")
        conditions[name] = shared | read_settings(table, str(path), prefix=f"conditions.{name}.")
    if len(conditions) < 2:
        raise CountdownError(
            f"`{path}` has no two conditions to compare",
            "add tables, such as [conditions.baseline] and [conditions.grpo.loss]",
        )
    if "train.seed" in set().union(*conditions.values()):
        raise CountdownError(f"`{path}` sets `train.seed`", "a study has `study.seeds` and `study.first_seed`")
    return Study(path.stem, design, conditions)


def compare(solved: Mapping[str, Sequence[str]]) -> list[Difference]:
    """Each condition less the first. `solved`: by condition, for each seed one character per puzzle, "1" if solved.

    The same seed and the same puzzle are paired. A difference has two p-values, over seeds and over puzzles, and the
    larger counts: it must hold for other seeds and for other puzzles (Clark 1973).
    """
    baseline, *others = solved
    base = _matrix(solved[baseline])
    differences, tested = [], list[float]()
    for condition in (baseline, *others):
        own = _matrix(solved[condition])
        accuracies = [fmean(row) for row in own]
        by_seed = [fmean(row) - fmean(other) for row, other in zip(own, base, strict=True)]
        by_puzzle = [
            fmean(column) - fmean(other)
            for column, other in zip(zip(*own, strict=True), zip(*base, strict=True), strict=True)
        ]
        (interval, p_seeds), (_, p_puzzles) = paired(by_seed), paired(by_puzzle)
        tested.append(max(p_seeds, p_puzzles))
        differences.append((condition, fmean(accuracies), bootstrap(accuracies), fmean(by_seed), interval))
    corrected = [1.0, *holm(tested[1:])]
    return [Difference(*facts, p_value) for facts, p_value in zip(differences, corrected, strict=True)]


def _matrix(rows: Sequence[str]) -> list[list[int]]:
    return [[int(mark) for mark in row] for row in rows]


def detectable(seeds: int, comparisons: int, spread: float) -> float:
    """The smallest difference that is found with a probability of 80 %, if `spread` is its deviation between seeds.

    (t(alpha / m) + t(80 %)) * spread / sqrt(seeds), alpha = 0.05 divided by the number of comparisons m.
    """
    freedom = seeds - 1
    quantiles = student_quantile(SIGNIFICANT / comparisons, freedom) + student_quantile(2 * (1 - POWER), freedom)
    return quantiles * spread / math.sqrt(seeds)
