"""The plain path: the model's own forward, one row per completion. Slower, for any causal model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_cli.core.model.logprobs import Entropy, scatter, token_logprobs
from grpo_cli.core.model.policy import Policy, Sequences


@dataclass(frozen=True)
class PlainPath:
    """Log-probs of rows [prompt | completion | padding]: padding at the end does not affect the rest."""

    cached: bool = True  # whether the model's own cache decodes right

    def logprobs(
        self, policy: Policy, sequences: Sequences, *, temperature: float, entropy: Entropy, logit_chunk: int
    ) -> tuple[Tensor, Tensor]:
        """As `Policy.logprobs`; all logits at once."""
        answered = [sequences.prompts[owner] for owner in sequences.prompt_index]
        rows = [prompt + completion for prompt, completion in zip(answered, sequences.completions, strict=True)]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=policy.device)
        targets = torch.tensor([token for row in sequences.completions for token in row], device=policy.device)
        lengths = [len(completion) for completion in sequences.completions]
        with policy.autocast():
            logits = policy.model(input_ids=tokens, use_cache=False).logits  # (B, T, V)
            ends = [(len(prompt) - 1, len(prompt) - 1 + n) for prompt, n in zip(answered, lengths, strict=True)]
            flat = torch.cat([row[start:end] for row, (start, end) in zip(logits, ends, strict=True)])  # (M, V)
            values = token_logprobs(flat, targets, temperature, entropy=entropy)
        return scatter(values[0], lengths, range(len(rows))), scatter(values[1], lengths, range(len(rows)))
