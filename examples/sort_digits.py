"""A task of your own: sort digits. Try `countdown train --task examples/sort_digits.py --dry-run`."""

import random


def problems(split):
    """All problems of a split; val has lists that train never shows."""
    rng = random.Random(split)
    drawn = dict.fromkeys(tuple(rng.sample(range(10), 4)) for _ in range(400))  # each once
    return [list(digits) for digits in drawn if (sum(digits[:2]) % 4 == 0) == (split == "val")]


def prompt(digits):
    """The question that the model reads."""
    asked = " ".join(map(str, digits))
    return f"Sort the digits {asked} from small to large. Write them inside <answer> </answer>, with spaces between."


def score(completion, digits):
    """1.0 for the sorted digits, 0.2 for the right digits in another order, 0.1 for an answer at all."""
    if "<answer>" not in completion:
        return {"format": 0.0, "digits": 0.0}
    answer = completion.rpartition("</answer>")[0].rpartition("<answer>")[2].split()
    if answer == [str(digit) for digit in sorted(digits)]:
        return {"format": 0.1, "digits": 0.9}
    return {"format": 0.1 * bool(answer), "digits": 0.1 * (sorted(answer) == sorted(map(str, digits)))}


def solution(digits):
    """A completion that scores 1.0."""
    return f"<answer>{' '.join(map(str, sorted(digits)))}</answer>"
