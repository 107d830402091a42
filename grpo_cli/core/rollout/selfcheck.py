"""Compare what a policy computes with its model's own plain forward, and choose the fastest path that agrees.

The probe is a rollout of ragged prompts whose rows end at different lengths, its packed log-probabilities, and the
gradient where it is computed otherwise, in the precision of the training. The plain forward takes one unpadded row at a
time, in eval mode. Paths, fastest first: packed, on CUDA with fused kernels; packed; packed with logits from the
model's own forward; plain; plain without the model's cache. Knows no architecture by name.

A path costs 3 plain rows, one packed pass, a prefill and at most 7 decode steps: about 250 tokens in all, with gradient
checkpointing 2 rows more, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import cast

import torch
from torch import Tensor

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model import lora
from grpo_cli.core.model.load import detect_device, load, use_checkpointing
from grpo_cli.core.model.logprobs import token_logprobs
from grpo_cli.core.model.packed import PackedPath
from grpo_cli.core.model.plain import PlainPath
from grpo_cli.core.model.policy import ComputePath, Policy, Sequences, set_attention
from grpo_cli.core.model.templates import PROBE, strips_thoughts
from grpo_cli.core.rollout.engine import uniforms
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.params import SamplingParams

PROBE_TOKENS = 24
GENERATIONS, NEW_TOKENS = 3, 8
ENDS = 16  # one of so many tokens ends a row, so that rows end at different lengths
LARGEST = 3e-4  # difference of a log-probability in float32: right models stay below 1e-4, real ones below 2e-5
MEAN = 0.1  # mean difference where the arithmetic is bfloat16: docs/models.md has what right and wrong models show
GRADIENT = {"float32": 1e-3, "bfloat16": 0.1}  # relative difference of a gradient
NOISE = 5  # or so many times further from the float32 gradient than the plain one in bfloat16: right paths reach 4.6
LOGITS = 1e-3  # relative difference of logits
COMPARED = (0, 2, 4)  # rows of the probe that the plain forward computes

PATHS: dict[str, ComputePath] = {  # fastest first
    "fused": PackedPath(fused=True),
    "packed": PackedPath(),
    "packed, own logits": PackedPath(own_logits=True),
    "plain": PlainPath(),
    "plain, uncached": PlainPath(cached=False),
}


@dataclass(frozen=True)
class Outcome:
    """The path chosen, its largest difference from the plain forward, and why faster paths were left."""

    path: str
    gap: float
    reason: str = ""

    def sentence(self, policy: Policy) -> str:
        """One line for the user: why it is not the fastest path."""
        slower = "plain path, slower"
        if isinstance(policy.path, PackedPath):
            missing = "with the model's own logits" if policy.path.own_logits else "without fused kernels"
            slower = f"fast path {missing}"
        return f"`{policy.name}` ({type(policy.model).__name__}) runs on the {slower}: {self.reason}"


class Disagreement(Exception):
    """A path computes something else than the model."""


def load_checked(
    source: str,
    *,
    name: str,
    device: str,
    precision: str,
    gradient_checkpointing: bool = False,
    adapter: lora.Lora | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Policy:
    """Load a model, called `name`, on a path that computes what the model does; `note` gets the outcome in one line.

    Raises CountdownError as `load` and `checked` do.
    """
    on_host = adapter is not None  # 4-bit weights are made there
    loaded = load(
        source, device=device, precision=precision, gradient_checkpointing=gradient_checkpointing, on_host=on_host
    )
    if adapter:
        lora.adapt(loaded.model, adapter, name=source)
        loaded.model.to(detect_device(device))
    loaded = replace(loaded, name=name, adapter=adapter)
    if strips_thoughts(loaded.tokenizer):
        note(f"the chat template of `{name}` strips earlier thoughts: worked examples go into the user's turn")
    return _checked_and_noted(loaded, gradient_checkpointing, note)


def recheck(policy: Policy, note: Callable[[str], None]) -> Policy:
    """The policy with gradient checkpointing, on a path that computes right with it; raises as `load_checked`."""
    use_checkpointing(policy.name, policy.model)
    return _checked_and_noted(policy, True, note)


def _checked_and_noted(policy: Policy, checkpointing: bool, note: Callable[[str], None]) -> Policy:
    with lora.perturbed(policy.model):
        policy, outcome = checked(policy, checkpointing=checkpointing)
    if outcome.reason:
        note(outcome.sentence(policy))
    return policy


def checked(
    policy: Policy, prompts: Sequence[list[int]] = (), *, checkpointing: bool = False
) -> tuple[Policy, Outcome]:
    """The policy on the fastest path that agrees with its model's plain forward.

    `prompts` default to pieces of a chat in the model's own template. Raises CountdownError if no path agrees.
    """
    prompts = prompts or _pieces(policy)
    reasons = ["attention other than full causal attention"] if isinstance(policy.path, PlainPath) else []
    try:
        _require_causal(policy, prompts)
        for name, path in dropwhile(lambda item: item[1] != policy.path, PATHS.items()):
            candidate = _on(policy, path)
            try:
                gap = _gap(candidate, prompts, checkpointing=checkpointing)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever an unknown architecture raises, or a disagreement
                reasons.append(_one_line(error))
                continue
            return candidate, Outcome(name, gap, reasons[0] if reasons else "")
    except Disagreement as error:
        reasons.append(str(error))
    raise CountdownError(
        f"`{policy.name}` ({type(policy.model).__name__}) cannot be used: {reasons[-1]}",
        "if its weights are damaged, use an earlier save; or else a model of another architecture",
    )


def plain_logprobs(policy: Policy, sequences: Sequences, *, temperature: float = 1.0) -> list[Tensor]:
    """Log-probabilities of each completion's tokens, by the model's own forward of one unpadded row at a time."""
    rows = []
    with plain_attention(policy), policy.autocast():
        for completion, owner in zip(sequences.completions, sequences.prompt_index, strict=True):
            row = torch.tensor([sequences.prompts[owner] + completion], device=policy.device)
            logits = policy.model(input_ids=row, use_cache=False).logits[0, -len(completion) - 1 : -1]  # (C, V)
            rows.append(token_logprobs(logits, row[0, -len(completion) :], temperature)[0])
    return rows


@contextmanager
def plain_attention(policy: Policy) -> Iterator[None]:
    """Attention as the model does it by itself, within this context."""
    set_attention(policy.model, plain=True)
    try:
        yield
    finally:
        set_attention(policy.model, plain=isinstance(policy.path, PlainPath))


def _on(policy: Policy, path: ComputePath) -> Policy:
    set_attention(policy.model, plain=isinstance(path, PlainPath))
    return replace(policy, path=path)


def _pieces(policy: Policy) -> list[list[int]]:
    tokens = policy.encode(PROBE)[-PROBE_TOKENS:]
    return [tokens[: len(tokens) // 3], tokens]


@torch.no_grad()
def _require_causal(policy: Policy, prompts: Sequence[list[int]]) -> None:
    """Raise Disagreement if what the model predicts depends on later tokens, or if it cannot run by itself."""
    row = torch.tensor([max(prompts, key=len)], device=policy.device)
    half = row.shape[1] // 2
    try:
        with _no_draws(), plain_attention(policy), policy.autocast():
            logits = [policy.model(input_ids=part, use_cache=False).logits[0, :half] for part in (row, row[:, :half])]
        if not bool(logits[0].isfinite().all() and logits[0].any()):
            raise Disagreement("its logits are all zero or not finite")
        whole, prefix = (part.float().log_softmax(dim=-1) for part in logits)
    except (torch.OutOfMemoryError, Disagreement):
        raise
    except Exception as error:
        raise Disagreement(f"its own forward fails on tokens alone ({_one_line(error)})") from error
    expected = (whole.exp() * (whole - prefix).abs()).sum(dim=-1)  # (T,): of tokens as the model draws them
    if not _agree(policy, expected):
        raise Disagreement("it is no causal model: what it predicts depends on later tokens")


def _gap(policy: Policy, prompts: Sequence[list[int]], *, checkpointing: bool) -> float:
    """Largest difference of the policy's log-probabilities from the plain ones. Raises Disagreement beyond bounds."""
    if isinstance(policy.path, PackedPath) and not policy.path.own_logits:
        _compare_logits(policy, prompts[0])
    sequences, pairs = _differences(policy, prompts)
    for problem, difference in pairs.items():
        if not _agree(policy, difference):
            raise Disagreement(f"{problem} by {float(difference.max()):.2g}")
    if checkpointing or policy.path == PATHS["fused"]:
        _compare_gradients(policy, sequences.subset([0, GENERATIONS]))
    return max(float(difference.max()) for difference in pairs.values())


def _differences(policy: Policy, prompts: Sequence[list[int]]) -> tuple[Sequences, dict[str, Tensor]]:
    """Sampled sequences, and the distances (M,) of their log-probabilities computed in three ways."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    ending = replace(policy, end_ids=tuple(range(0, vocabulary, ENDS)))
    rollout = LocalEngine(ending).sample(
        prompts,
        SamplingParams(NEW_TOKENS, num_generations=GENERATIONS),
        uniform=uniforms(0, 0, range(len(prompts)), GENERATIONS, NEW_TOKENS),
    )
    owners = [row // GENERATIONS for row in range(len(rollout.completions))]
    sequences = Sequences(list(map(list, prompts)), rollout.completions, owners)
    with torch.no_grad():
        with _no_draws():
            logprobs = policy.logprobs(sequences, temperature=1.0)[0]
        some = sequences.subset(COMPARED)
        exact = torch.cat(plain_logprobs(policy, some))
    sampled = [torch.tensor(row, device=exact.device) for row in rollout.logprobs]
    packed = [row[: len(own)] for row, own in zip(logprobs, sampled, strict=True)]
    of_sampler, of_trainer = (torch.cat([rows[row] for row in COMPARED]) for rows in (sampled, packed))
    return sequences, {
        "sampled log-probs differ from the plain forward": (of_sampler - exact).abs(),
        "packed log-probs differ from the plain forward": (of_trainer - exact).abs(),
        "sampled and packed log-probs differ": (torch.cat(sampled) - torch.cat(packed)).abs(),
    }


@torch.no_grad()
def _compare_logits(policy: Policy, prompt: list[int]) -> None:
    """Raise Disagreement if the model's logits are not just hidden states times its output matrix.

    Both are computed alike, so that rounding does not hide it in bfloat16 either.
    """
    row = torch.tensor([prompt], device=policy.device)
    with plain_attention(policy), policy.autocast():
        hidden = policy.model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state
        actual, expected = policy.logits(hidden).float(), policy.model(input_ids=row, use_cache=False).logits.float()
    relative = _ratio(actual - expected, expected)
    if not relative <= LOGITS:
        raise Disagreement(f"the model changes logits after its output matrix, by {relative:.1%}")


def _compare_gradients(policy: Policy, sequences: Sequences) -> None:
    """Raise Disagreement if the gradient, as training computes it, is not that of the plain forward."""
    weight = next(weight for weight in policy.model.parameters() if weight.requires_grad)  # behind all layers

    def gradient(logprobs: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            (result,) = torch.autograd.grad(logprobs().sum(), weight)
            return cast("Tensor", result.float())

    with _no_draws():
        trained = gradient(lambda: policy.logprobs(sequences, temperature=1.0)[0])
    checkpointed = policy.model.is_activation_checkpointing
    if checkpointed:
        policy.model.activation_checkpointing_disable()
    try:
        exact = gradient(lambda: torch.cat(plain_logprobs(policy, sequences)))
        relative = _ratio(trained - exact, exact)
        agrees = relative <= GRADIENT[_arithmetic(policy)]
        if not agrees and _arithmetic(policy) == "bfloat16":
            with _float32(policy) as precise:
                truth = gradient(lambda: torch.cat(plain_logprobs(precise, sequences)))
            relative = _ratio(trained - truth, truth)
            agrees = relative <= NOISE * _ratio(exact - truth, truth)
    finally:
        if checkpointed:
            policy.model.activation_checkpointing_enable()
    if not agrees:
        under = " under gradient checkpointing" if checkpointed else ""
        raise Disagreement(f"gradients{under} differ by {relative:.1%}")


@contextmanager
def _float32(policy: Policy) -> Iterator[Policy]:
    """The policy with bfloat16 weights widened and float32 arithmetic, within this context."""
    weights = [weight for weight in policy.model.parameters() if weight.dtype == torch.bfloat16]
    saved = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.float()
        yield replace(policy, precision="float32")
    except torch.OutOfMemoryError:
        raise Disagreement("gradients differ, and float32 weights to compare them do not fit in memory") from None
    finally:
        for weight, data in zip(weights, saved, strict=True):
            weight.data = data


@contextmanager
def _no_draws() -> Iterator[None]:
    """Raise Disagreement if a layer draws random numbers within this context."""
    before = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)
    yield
    after = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)
    if not all(map(torch.equal, before, after)):
        raise Disagreement("a layer draws random numbers, as dropout does")


def _arithmetic(policy: Policy) -> str:
    return "float32" if policy.precision == "float32" else "bfloat16"


def _ratio(difference: Tensor, whole: Tensor) -> float:
    """Relative difference from the plain forward's numbers; NaN if both are 0 or not finite."""
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(whole))


def _agree(policy: Policy, differences: Tensor) -> bool:
    """Whether differences are within the bound; those that are not numbers are not."""
    if _arithmetic(policy) == "float32":
        return bool(differences.max() <= LARGEST)
    return bool(differences.mean() <= MEAN)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, Disagreement) else f"{type(error).__name__}: {text[:100]}"
