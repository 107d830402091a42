"""Suites: cells of puzzles on which models are evaluated side by side.

A cell is written `val 3 one-shot`: split, numbers per puzzle, prompt style; `val one-shot` if sizes are mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import get_args

from grpo_cli.core.task.prompts import STYLES
from grpo_cli.core.task.puzzle import SIZES as SIZES
from grpo_cli.core.task.task import Split


def cell_name(split: Split, numbers: int, style: str) -> str:
    """The name of a cell: `val 3 one-shot`."""
    return " ".join([split, *([str(numbers)] if numbers else []), style])


@dataclass(frozen=True)
class Cell:
    """Puzzles of one split, size (0: mixed, or none) and prompt style."""

    split: Split
    numbers: int
    style: str

    @property
    def name(self) -> str:
        """The cell's name: `val 3 one-shot`."""
        return cell_name(self.split, self.numbers, self.style)


CELLS = {cell.name: cell for cell in (Cell(*parts) for parts in product(get_args(Split), SIZES, STYLES))}


def cell(text: str) -> Cell:
    """Parse a cell's name; raises ValueError, with a suggestion, if it is invalid."""
    name = " ".join(text.split())
    if name not in CELLS:
        nearest = get_close_matches(name, CELLS, n=1)
        raise ValueError(f"`{text}` is not a cell" + (f"; did you mean `{nearest[0]}`?" if nearest else ""))
    return CELLS[name]


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted mean of the cells' values. At least one weight is above 0; none is too large."""
    largest = max(weights.values())
    shares = {name: weight / largest for name, weight in weights.items()}
    return sum(share * values[name] for name, share in shares.items()) / sum(shares.values())
