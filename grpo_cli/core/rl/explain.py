"""Where better and worse completions part, and the losses that a step's gradient is compared with. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from grpo_cli.core.config.settings import Loss

OWN = "as trained"  # the variant of the run itself


@dataclass(frozen=True)
class Branch:
    """The completions of a group that continue with the same token; None: they end."""

    token: int | None
    samples: list[int]


@dataclass(frozen=True)
class Fork:
    """Completions that share their first `position` tokens and then part: most better ones here, most worse there."""

    position: int
    better: Branch
    worse: Branch


def fork(completions: Sequence[Sequence[int]], advantages: Sequence[float]) -> Fork | None:
    """The first token at which better and worse completions part: where it says most about the advantage's sign.

    Of all prefixes that several completions share, the one whose next token carries most information, in nats times
    completions; the shortest of equals. None if all advantages are zero.
    """
    best, most = None, 1e-9
    for position, members in _prefixes(completions, list(range(len(completions)))):
        branches = _branches(completions, members, position)
        better, worse = _largest(branches, advantages, 1), _largest(branches, advantages, -1)
        gain = _disorder(members, advantages) - sum(_disorder(own, advantages) for own in branches.values())
        if better and worse and better.token != worse.token and gain > most:
            best, most = Fork(position, better, worse), gain + 1e-9
    return best


def _prefixes(completions: Sequence[Sequence[int]], members: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(length, completions) of every shared prefix after which these completions part, the shortest first."""
    level = [(0, members)]
    while level:
        position, own = level.pop(0)
        while len(branches := _branches(completions, own, position)) == 1 and None not in branches:
            position += 1
        if len(branches) > 1:
            yield position, own
            level += [(position + 1, some) for token, some in branches.items() if token is not None and len(some) > 1]


def _branches(
    completions: Sequence[Sequence[int]], members: Sequence[int], position: int
) -> dict[int | None, list[int]]:
    branches: dict[int | None, list[int]] = {}
    for sample in members:
        tokens = completions[sample]
        branches.setdefault(tokens[position] if position < len(tokens) else None, []).append(sample)
    return branches


def _largest(branches: Mapping[int | None, list[int]], advantages: Sequence[float], sign: int) -> Branch | None:
    """The branch with most completions of this sign of the advantage, if any has some."""
    counts = {token: sum(advantages[one] * sign > 0 for one in own) for token, own in branches.items()}
    token = max(counts, key=lambda key: counts[key])
    return Branch(token, branches[token]) if counts[token] else None


def _disorder(members: Sequence[int], advantages: Sequence[float]) -> float:
    """Entropy of the advantage's sign among completions, times their number."""
    better = sum(advantages[one] > 0 for one in members) / len(members)
    parts = [share for share in (better, 1 - better) if share > 0]
    return -len(members) * sum(share * math.log(share) for share in parts)


def variants(loss: Loss) -> dict[str, Loss]:
    """The run's loss, and every other that differs in one setting: type, scale of rewards, or estimator of the KL."""
    losses = {OWN: loss}
    for name in ("loss_type", "scale_rewards", *(["kl_estimator"] if loss.beta else [])):
        others = [value for value in get_args(Loss.model_fields[name].annotation) if value != getattr(loss, name)]
        losses |= {f"{name} {value}": loss.model_copy(update={name: value}) for value in others}
    return losses
