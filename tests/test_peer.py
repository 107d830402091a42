"""Live parity with TRL's GRPOTrainer: same weights, tokens, rewards, old and reference log-probabilities.

Both sides start from one folder and are handed the same completions; the old and reference log-probabilities are
perturbed, or neither the clip nor the KL would be put to the test. Run `pytest -m peer -s` to see the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from grpo_cli.core.config.settings import Loss
from grpo_cli.core.model.policy import Policy, Sequences
from grpo_cli.core.rl.grpo import advantages, batch_loss, normalizer
from grpo_cli.core.task.prompts import prompt
from grpo_cli.core.task.puzzle import Puzzle

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


def trainer(folder: Path, output: Path, fixed: Fixed, *, loss_type: str, beta: float, scale: str) -> Any:
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
        per_device_train_batch_size=rows,
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
        use_bias_correction_kl=False,
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


@pytest.fixture(scope="module")
def report() -> Iterator[Table]:
    table = Table("loss", "beta", "|loss difference|", "largest gradient difference", "loss", "largest gradient")
    yield table
    Console(width=110).print("\n", table)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_loss_and_gradient_equal_trls(
    tiny_policy: Policy, fixed: Fixed, tiny_folder: Path, tmp_path: Path, report: Table, loss_type: str, beta: float
) -> None:
    sequences, mask = fixed.sequences, fixed.sequences.mask()
    logprobs, _ = tiny_policy.logprobs(sequences, temperature=TEMPERATURE)
    old, reference = logprobs.detach() + fixed.old_noise * mask, logprobs.detach() + fixed.ref_noise * mask

    peer = trainer(tiny_folder, tmp_path, fixed, loss_type=loss_type, beta=beta, scale="group")
    inputs = {**peer_inputs(peer, fixed), "old_per_token_logps": old, "ref_per_token_logps": reference}
    expected = peer.compute_loss(peer.model, inputs)
    expected.backward()

    loss = Loss(
        loss_type=loss_type,  # type: ignore[arg-type]
        beta=beta,
        epsilon=EPSILON,
        epsilon_high=EPSILON_HIGH,
        kl_estimator="k3",
        scale_rewards="group",
    )
    weight = normalizer(mask.sum(dim=1), loss_type=loss_type, max_new_tokens=MAX_NEW_TOKENS)
    advantage = advantages(fixed.rewards).flatten()
    found, clipped, _ = batch_loss(logprobs, old, reference if beta > 0 else None, advantage, mask, weight, loss)
    found.backward()

    ours = {name: parameter.grad for name, parameter in tiny_policy.model.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in peer.model.named_parameters()}
    assert ours.keys() == theirs.keys()
    gaps = [float((ours[name] - theirs[name]).abs().max()) for name in ours]
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    gap = abs(found.item() - expected.item())
    report.add_row(loss_type, str(beta), f"{gap:.1e}", f"{max(gaps):.1e}", f"{expected.item():.6f}", f"{largest:.3f}")
    assert gap < 1e-6 and max(gaps) < 1e-5
    assert largest > 0.01 and clipped.any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trls(fixed: Fixed, tiny_folder: Path, tmp_path: Path, scale: str) -> None:
    peer = trainer(tiny_folder, tmp_path, fixed, loss_type="grpo", beta=0.0, scale=scale)
    expected = peer_inputs(peer, fixed)["advantages"]
    torch.testing.assert_close(advantages(fixed.rewards, scale=scale).flatten(), expected, atol=1e-6, rtol=0)
