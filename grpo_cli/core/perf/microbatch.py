"""How many rows are computed at once, and half as many each time that memory runs out.

Knows neither what the rows are nor what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from grpo_cli.core.errors import CountdownError

T = TypeVar("T")
# How torch words it where it has no exception of its own for it.
SENTENCES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class MicroBatch:
    """At most `rows` at once, or all if that is 0; halved for good whenever they do not fit."""

    def __init__(self, rows: int = 0, *, told: Callable[[str], None] = lambda _: None) -> None:
        self.rows = rows
        self._told = told

    def attempt(self, work: Callable[[int], T], *, total: int, doing: str) -> T:
        """`work` on `total` rows, given how many to do at once; done again with half as many if memory runs out.

        What `work` leaves behind when it fails must not matter. Raises CountdownError if one row does not fit.
        """
        while True:
            try:
                return work(self.rows)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
            self._halve(total, doing)

    def _halve(self, total: int, doing: str) -> None:
        largest = min(self.rows or total, total)
        if largest <= 1:
            raise CountdownError(
                f"memory ran out in the {doing} of a single completion",
                "set a smaller `--max-new-tokens`, set `--gradient-checkpointing on`, or take a smaller model",
                exit_code=1,
            )
        self.rows = (largest + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        completions = "1 completion" if self.rows == 1 else f"{self.rows} completions"
        self._told(f"memory ran out in the {doing}: doing it again with {completions} at once")


def ran_out(error: Exception) -> bool:
    """Whether an exception says that there was too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in SENTENCES)
