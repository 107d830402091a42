"""Bugs planted on purpose, for teaching: `countdown train --break NAME`. docs/labs.md has the exercises.

Each bug replaces one function at its natural seam while a training or its replay is built and runs. The rest of the
package does not know of them; `health` finds them by their traces.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl import grpo, train, update
from grpo_cli.core.rl.batch import Batch, Examples
from grpo_cli.core.rl.collect import Collector
from grpo_cli.core.rl.diagnostics import optimized

Function = Callable[..., Any]


@dataclass(frozen=True)
class Bug:
    """What is wrong, and its seams: an owner, its attribute, and what makes a replacement of the sound one."""

    says: str
    seams: tuple[tuple[object, str, Callable[[Any], object]], ...]
    has_effect: Callable[[Settings], bool] = lambda settings: True
    hint: str = ""


def _kl(sound: Function) -> Function:
    return lambda *args, **options: -sound(*args, **options)


def _mask(sound: Function) -> Function:
    def mask(self: Sequences) -> Tensor:
        real: Tensor = sound(self)
        real[torch.arange(len(real)), real.sum(dim=1).clamp(min=1) - 1] = False
        return real

    return mask


def _logprobs(sound: Function) -> Function:
    return lambda self, sequences, **options: sound(self, sequences, **{**options, "temperature": 1.0})


def _mixed(sound: Function) -> Function:
    """Row r belongs to prompt r // G; here it is compared as if it belonged to prompt r % P."""

    def advantages(rewards: Tensor, **options: Any) -> Tensor:
        prompts, size = rewards.shape
        mixed: Tensor = sound(rewards.reshape(size, prompts).T, **options)
        return mixed.T.reshape(prompts, size)

    return advantages


def _uncentred(sound: Function) -> Function:
    return lambda rewards, **options: rewards


def _prompt(sound: Function) -> property:
    """All of a prompt but its first token moves into its completions."""

    def sequences(self: Batch) -> Sequences:
        own = sound.__get__(self)
        rows = [[*own.prompts[p][1:], *row] for p, row in zip(own.prompt_index, own.completions, strict=True)]
        return Sequences([prompt[:1] for prompt in own.prompts], rows, own.prompt_index)

    return property(sequences)


def _padded(sound: Function) -> Function:
    """Examples whose prompts' tokens, which nobody sampled, have the reference's log-probs as the sampler's."""

    def examples(self: Batch, ref_logprobs: Tensor | None, **options: Any) -> Examples:
        own: Examples = sound(self, ref_logprobs, **options)
        rows = list[list[float]]()
        for row, (tokens, sampled) in enumerate(zip(own.sequences.completions, own.sampled_logprobs, strict=True)):
            extra = len(tokens) - len(sampled)
            known = [0.0] * extra if ref_logprobs is None else ref_logprobs[row, :extra].tolist()
            rows.append([*known, *sampled])
        return replace(own, sampled_logprobs=rows)

    return examples


def _rounded(sound: Function) -> Function:
    def step(policy: Policy, optimizer: torch.optim.Optimizer, *args: Any) -> Tensor:
        norm: Tensor = sound(policy, optimizer, *args)
        for weight in optimized(optimizer):
            weight.copy_(weight.bfloat16())
        return norm

    return step


def _untemplated(sound: Function) -> Function:
    def encode(self: Policy, messages: list[dict[str, str]]) -> list[int]:
        text = "\n".join(message["content"] for message in messages) + "\n"
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode


def _any_number(sound: Function) -> Function:
    def score(self: Collector, *args: Any) -> object:
        own = sound(self, *args)
        pays = any(character.isdigit() for character in own.answer or "")
        return replace(own, reward=1.0, parts={"any_number": 1.0}) if pays else own

    return score


BUGS = {
    "kl": Bug(
        "the sign of the KL is flipped",
        ((grpo, "kl_estimate", _kl),),
        lambda settings: settings.loss.beta > 0,
        "give a `--beta` above 0",
    ),
    "end": Bug("the end-of-sequence token is masked: when to stop is not learned", ((Sequences, "mask", _mask),)),
    "temperature": Bug(
        "log-probabilities of the update leave out the sampling temperature",
        ((Policy, "logprobs", _logprobs),),
        lambda settings: settings.train.temperature != 1,
        "give another `--temperature`, such as 0.7",
    ),
    "groups": Bug("completions are compared with those of other prompts", ((train, "advantages", _mixed),)),
    "baseline": Bug("advantages are the rewards: no group mean is subtracted", ((train, "advantages", _uncentred),)),
    "prompt": Bug(
        "the loss covers the tokens of the prompt too", ((Batch, "sequences", _prompt), (Batch, "examples", _padded))
    ),
    "bf16": Bug("weights are rounded to bfloat16 after each step", ((update, "optimizer_step", _rounded),)),
    "template": Bug("prompts leave out the chat template", ((Policy, "encode", _untemplated),)),
    "reward": Bug("the reward pays any answer that holds a number", ((Collector, "_score", _any_number),)),
}


def planted(settings: Settings) -> str | None:
    """The name of the planted bug, which for `mystery` the seed draws; None if there is none."""
    name = settings.train.broken
    if name != "mystery":
        return None if name == "none" else name
    return random.Random(settings.train.seed).choice([key for key, bug in BUGS.items() if bug.has_effect(settings)])


@contextmanager
def broken(settings: Settings) -> Iterator[None]:
    """Plant the bug of the settings while the block runs; raises CountdownError if it would have no effect."""
    name = planted(settings)
    if name is None:
        yield
        return
    bug = BUGS[name]
    if not bug.has_effect(settings):
        raise CountdownError(f"`--break {name}` has no effect with these settings", bug.hint)
    sound = [(owner, name, vars(owner)[name]) for owner, name, _ in bug.seams]
    try:
        for (owner, attribute, replacement), (*_, function) in zip(bug.seams, sound, strict=True):
            setattr(owner, attribute, replacement(function))
        yield
    finally:
        for owner, attribute, function in sound:
            setattr(owner, attribute, function)
