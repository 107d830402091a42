"""Live parity with TRL's GRPOTrainer: same weights, tokens, rewards, old and reference log-probabilities.

Both sides start from one folder and are handed the same completions; the old and reference log-probabilities are
perturbed, or neither the clip nor the KL would be put to the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import default_loss
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.microbatch import MicroBatch
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.batch import Examples
from grpo_cli.core.rl.grpo import advantages, batch_loss, normalizer
from grpo_cli.core.rl.observer import no_poll
from grpo_cli.core.rl.update import Objective, _accumulate, _Inputs, _record_old_logprobs
from grpo_cli.core.task.prompts import prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.world import World

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]
GROUPS, GENERATIONS, MAX_NEW_TOKENS, TEMPERATURE = 3, 4, 24, 1.2
EPSILON, EPSILON_HIGH = 0.2, 0.28
PUZZLES = [
    (Puzzle((3, 5, 2), 13), "zero-shot"),
    (Puzzle((4, 7, 3, 9), 25), "one-shot"),
    (Puzzle((2, 8), 10), "natural"),
]


@dataclass(frozen=True)
class Fixed:
    """What both sides are handed: completions (rows of the groups, one after another), their rewards and the noise."""

    sequences: Sequences
    rewards: Tensor  # (P, G)
    old_noise: Tensor  # (B, T)
    ref_noise: Tensor  # (B, T)


@pytest.fixture
def fixed(tiny_policy: Policy) -> Fixed:
    rng = torch.Generator().manual_seed(5)
    rows = GROUPS * GENERATIONS
    lengths = torch.randint(1, MAX_NEW_TOKENS + 1, (rows,), generator=rng).tolist()
    completions = [torch.randint(0, 800, (length,), generator=rng).tolist() for length in lengths]
    completions[3][-1] = tiny_policy.end_ids[0]
    prompts = [tiny_policy.encode(prompt(puzzle, style)) for puzzle, style in PUZZLES]  # type: ignore[arg-type]
    sequences = Sequences(prompts, completions, [row // GENERATIONS for row in range(rows)])
    shape = sequences.mask().shape
    rewards = torch.tensor([[1.0, 0.2, 0.0, 0.2], [0.1, 0.1, 0.1, 0.1], [0.0, 1.0, 1.0, 0.1]])
    return Fixed(sequences, rewards, *(0.3 * torch.randn(2, *shape, generator=rng)))


def trainer(
    folder: Path, output: Path, fixed: Fixed, *, loss_type: str, beta: float, scale: str, **changes: object
) -> Any:
    """TRL's trainer on the model in `folder`, its rollout and its reward replaced by `fixed`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    sequences, rows = fixed.sequences, GROUPS * GENERATIONS

    def rollout(prompts: list[str], _: object) -> dict[str, list[Any]]:
        assert prompts == [str(owner) for owner in sequences.prompt_index]
        return {
            "prompt_ids": [sequences.prompts[owner] for owner in sequences.prompt_index],
            "completion_ids": sequences.completions,
            "logprobs": [[0.0] * len(completion) for completion in sequences.completions],
        }

    def reward(completions: list[str], **_: object) -> list[float]:
        return fixed.rewards.flatten().tolist()

    settings = GRPOConfig(
        output_dir=str(output),
        **{"per_device_train_batch_size": rows, "use_bias_correction_kl": False, **changes},
        num_generations=GENERATIONS,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        loss_type="grpo" if loss_type == "gspo" else loss_type,
        importance_sampling_level="sequence" if loss_type == "gspo" else "token",
        beta=beta,
        epsilon=EPSILON,
        epsilon_high=1 + EPSILON_HIGH
        if loss_type == "cispo"
        else EPSILON_HIGH,  # TRL caps cispo at epsilon_high itself
        scale_rewards=scale,
        bf16=False,
        use_cpu=True,
        report_to="none",
        activation_checkpointing=False,
        disable_tqdm=True,
    )
    dataset = Dataset.from_list([{"prompt": str(group)} for group in range(GROUPS)])
    made = GRPOTrainer(
        model=str(folder), reward_funcs=reward, args=settings, train_dataset=dataset, rollout_func=rollout
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def peer_inputs(peer: Any, fixed: Fixed) -> dict[str, Tensor]:
    found: dict[str, Tensor] = peer._generate_and_score_completions(
        [{"prompt": str(owner)} for owner in fixed.sequences.prompt_index]
    )
    return found


def ours(loss_type: str, beta: float, **changes: object) -> Loss:
    """Our settings of the same loss."""
    given = {"loss_type": loss_type, "beta": beta, "epsilon": EPSILON, "epsilon_high": EPSILON_HIGH}
    return default_loss(**{**given, "kl_estimator": "k3", "sampler_correction": "none", **changes})


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_loss_and_gradient_equal_trls(
    tiny_policy: Policy, fixed: Fixed, tiny_folder: Path, tmp_path: Path, loss_type: str, beta: float
) -> None:
    sequences, mask = fixed.sequences, fixed.sequences.mask()
    logprobs, _ = tiny_policy.logprobs(sequences, temperature=TEMPERATURE)
    old, reference = logprobs.detach() + fixed.old_noise * mask, logprobs.detach() + fixed.ref_noise * mask

    peer = trainer(tiny_folder, tmp_path, fixed, loss_type=loss_type, beta=beta, scale="group")
    inputs = {**peer_inputs(peer, fixed), "old_per_token_logps": old, "ref_per_token_logps": reference}
    expected = peer.compute_loss(peer.model, inputs)
    expected.backward()

    loss = ours(loss_type, beta)
    weight = normalizer(mask.sum(dim=1), loss_type=loss_type, max_new_tokens=MAX_NEW_TOKENS)
    advantage = advantages(fixed.rewards).flatten()
    found, tokens = batch_loss(logprobs, old, reference if beta > 0 else None, advantage, mask, weight, loss)
    found.backward()

    own = {name: parameter.grad for name, parameter in tiny_policy.model.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in peer.model.named_parameters()}
    assert own.keys() == theirs.keys()
    gaps = [float((own[name] - theirs[name]).abs().max()) for name in own]
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert abs(found.item() - expected.item()) < 1e-6 and max(gaps) < 1e-5
    assert largest > 0.01 and tokens.clipped.any()


Choice = tuple[dict[str, object], dict[str, object], tuple[str, ...]]  # our settings, TRL's, and the loss types
CHOICES: list[Choice] = [
    ({"dual_clip": 1.4}, {"delta": 1.4}, ("grpo", "dapo")),
    ({"kl_estimator": "k3_unbiased"}, {"use_bias_correction_kl": True}, ("grpo", "cispo", "gspo")),
    ({"mask_truncated": True}, {"mask_truncated_completions": True}, ("grpo", "dapo", "dr_grpo")),
    ({"entropy_share": 0.3}, {"top_entropy_quantile": 0.3}, ("grpo", "cispo")),
    ({"entropy_bonus": 0.02}, {"entropy_coef": 0.02}, ("grpo", "dapo")),
]
for kind, level in product(("truncate", "mask"), ("token", "sequence")):
    corrected: dict[str, object] = {"sampler_correction": kind, "sampler_level": level, "sampler_cap": 1.2}
    mode: dict[str, object] = {"vllm_importance_sampling_mode": f"{level}_{kind}"}
    CHOICES.append((corrected, {**mode, "vllm_importance_sampling_clip_max": 1.2}, ("grpo", "dapo")))


@pytest.mark.parametrize(
    ("choice", "theirs", "loss_type"),
    [(choice, theirs, loss_type) for choice, theirs, types in CHOICES for loss_type in types],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_choices_of_the_loss_equal_trls(
    tiny_policy: Policy, fixed: Fixed, tiny_folder: Path, tmp_path: Path,
    choice: dict[str, object], theirs: dict[str, object], loss_type: str,
) -> None:  # fmt: skip
    """By `update`, with its micro-batches, and TRL's own masks and corrections."""
    sequences, mask = fixed.sequences, fixed.sequences.mask()
    with torch.no_grad():
        exact, _ = tiny_policy.logprobs(sequences, temperature=TEMPERATURE)
    sampled, reference = exact + fixed.old_noise * mask, exact + fixed.ref_noise * mask
    lengths = mask.sum(dim=1).tolist()
    rows = [row[:length].tolist() for row, length in zip(sampled, lengths, strict=True)]

    peer = trainer(tiny_folder, tmp_path, fixed, loss_type=loss_type, beta=0.05, scale="group", **theirs)
    loss = ours(loss_type, 0.05, **choice)
    # Several updates of one batch: the old log-probs are those of the perturbed weights.
    inputs = {**peer_inputs(peer, fixed), "ref_per_token_logps": reference, "old_per_token_logps": exact}
    if loss.sampler_correction != "none":
        peer.use_vllm = True  # its engine is not called
        inputs["importance_sampling_ratio"] = trls_weight(exact, sampled, mask, peer.args)
    with torch.no_grad():
        for weight, other in zip(tiny_policy.model.parameters(), peer.model.parameters(), strict=True):
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
            other.copy_(weight)
    expected = peer.compute_loss(peer.model, inputs)
    expected.backward()

    found, metrics = second_update(tiny_policy, fixed, loss, exact, reference, rows)
    theirs_by_name = {name: parameter.grad for name, parameter in peer.model.named_parameters()}
    gaps = [float((found[name] - theirs_by_name[name]).abs().max()) for name in found]
    largest = max(float(gradient.abs().max()) for gradient in theirs_by_name.values())
    assert abs(metrics["loss"] - expected.item()) < 1e-6 and max(gaps) < 1e-5
    assert largest > 0.01 and metrics["clip_fraction"] > 0.03


def trls_weight(old: Tensor, sampled: Tensor, mask: Tensor, args: Any) -> Tensor:
    """The weights of `_generate_and_score_completions`, which are computed only where vLLM samples."""
    difference = (old - sampled) * mask
    if args.vllm_importance_sampling_mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = difference.exp()
    if args.vllm_importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(max=args.vllm_importance_sampling_clip_max)
    return ratio.masked_fill(ratio > args.vllm_importance_sampling_clip_max, 0.0)


def second_update(
    policy: Policy, fixed: Fixed, loss: Loss, old: Tensor, reference: Tensor, sampled: list[list[float]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients by name and metrics of an update whose old log-probs are given, in micro-batches of 5 rows."""
    ends = set(policy.end_ids)
    truncated = [completion[-1] not in ends for completion in fixed.sequences.completions]
    examples = Examples(fixed.sequences, advantages(fixed.rewards).flatten(), sampled, reference, truncated=truncated)
    inputs = _Inputs.of(policy, examples, Objective(loss, TEMPERATURE, MAX_NEW_TOKENS))
    if inputs.objective.needs_old_logprobs:
        _record_old_logprobs(inputs, MicroBatch(5), World(), no_poll)
    inputs.old_logprobs = old.clone()
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    (part,) = inputs.parts()
    sums = _accumulate(inputs, part, optimizer, MicroBatch(5), World(), poll=no_poll, number=1, watch=None)
    gradients = {name: weight.grad for name, weight in policy.model.named_parameters() if weight.grad is not None}
    return gradients, sums.means(torch.zeros(()), has_kl=True)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_mini_batches_equal_trls_steps_per_generation(
    tiny_policy: Policy, fixed: Fixed, tiny_folder: Path, tmp_path: Path, loss_type: str
) -> None:
    mask, loss = fixed.sequences.mask(), ours(loss_type, 0.05)
    with torch.no_grad():
        exact, _ = tiny_policy.logprobs(fixed.sequences, temperature=TEMPERATURE)
    reference, rows = exact + fixed.ref_noise * mask, GROUPS * GENERATIONS
    peer = trainer(
        tiny_folder, tmp_path, fixed, loss_type=loss_type, beta=0.05, scale="group",
        per_device_train_batch_size=GENERATIONS, steps_per_generation=GROUPS,
    )  # fmt: skip
    inputs = {**peer_inputs(peer, fixed), "ref_per_token_logps": reference, "old_per_token_logps": exact}
    examples = Examples(fixed.sequences, advantages(fixed.rewards).flatten(), (), reference)
    objective = Objective(loss, TEMPERATURE, MAX_NEW_TOKENS, num_mini_batches=GROUPS)
    ours_in = _Inputs.of(tiny_policy, examples, objective)
    ours_in.old_logprobs = exact.clone()
    optimizer = torch.optim.SGD(tiny_policy.model.parameters(), lr=0.0)
    for number, part in enumerate(ours_in.parts()):
        chosen = slice(number * GENERATIONS, (number + 1) * GENERATIONS)
        own = {
            key: value[chosen] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
            for key, value in inputs.items()
        }
        peer.model.zero_grad()
        expected = peer.compute_loss(peer.model, own)
        expected.backward()
        sums = _accumulate(ours_in, part, optimizer, MicroBatch(3), World(), poll=no_poll, number=1, watch=None)
        assert sums.loss == pytest.approx(expected.item(), abs=1e-6)
        pairs = zip(tiny_policy.model.parameters(), peer.model.parameters(), strict=True)
        assert max(float((weight.grad - other.grad).abs().max()) for weight, other in pairs) < 1e-5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trls(fixed: Fixed, tiny_folder: Path, tmp_path: Path, scale: str) -> None:
    peer = trainer(tiny_folder, tmp_path, fixed, loss_type="grpo", beta=0.0, scale=scale)
    expected = peer_inputs(peer, fixed)["advantages"]
    torch.testing.assert_close(advantages(fixed.rewards, scale=scale).flatten(), expected, atol=1e-6, rtol=0)
