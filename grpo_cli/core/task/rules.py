"""Rules of countdown: operations, ranges of numbers and targets, and whether every number must be used."""

from dataclasses import dataclass
from math import comb

OPERATIONS = "+-*/"
NEEDS = {"-": "+", "/": "*"}  # a - (b - c) adds, and a / (b / c) multiplies


@dataclass(frozen=True, slots=True)
class Rules:
    """The original's rules by default. `operations` are some of `+-*/` in this order; division is exact."""

    operations: str = "+-*"
    min_number: int = 1
    max_number: int = 10
    min_target: int = 1
    max_target: int = 100
    use_all: bool = True

    @property
    def numbers(self) -> range:
        return range(self.min_number, self.max_number + 1)

    @property
    def targets(self) -> range:
        return range(self.min_target, self.max_target + 1)

    def choices(self, size: int) -> int:
        """Number of ways to choose `size` numbers, ignoring order."""
        return comb(len(self.numbers) + size - 1, size)


ORIGINAL = Rules()


def operations_in(text: str) -> str:
    """The operations in `text`, in the order of OPERATIONS; raises ValueError with the problem."""
    written = [character for character in text if character not in " ,"]
    if not written or len(set(written)) != len(written) or not set(written) <= set(OPERATIONS):
        raise ValueError("operations are some of + - * /, each once")
    for operation, needed in NEEDS.items():
        if operation in written and needed not in written:
            raise ValueError(f"`{operation}` needs `{needed}`: `a {operation} (b {operation} c)` uses it in disguise")
    return "".join(operation for operation in OPERATIONS if operation in written)
