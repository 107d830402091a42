"""The fast path: each prompt is computed once, and its completions share its keys.

For models whose layers attend to all earlier tokens. The self-check decides whether a model may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from grpo_cli.core.model import llama, lora
from grpo_cli.core.model.attention import Packed, Plan, Prefill, num_shared, order
from grpo_cli.core.model.logprobs import Entropy, in_chunks, scatter, token_logprobs
from grpo_cli.core.model.policy import Policy, Sequences

# Hidden size from which a CPU decodes in bfloat16 (2.5 times faster at 576; at 192 faster or slower, by processor) and
# updates through the model's own layers (1.2 times faster at 576).
WIDE = 512


@dataclass(frozen=True)
class PackedPath:
    """Log-probs of all sequences in one packed row; decoding step by step with shared prompts."""

    own_logits: bool = False  # logits by the model's own forward, which may scale them
    fused: bool = False  # Triton kernels, and weights read in place: on CUDA

    def logprobs(
        self, policy: Policy, sequences: Sequences, *, temperature: float, entropy: Entropy, logit_chunk: int
    ) -> tuple[Tensor, Tensor]:
        """As `Policy.logprobs`, from one row: all prompts, then all completions."""
        device = policy.device
        rows = order([len(row) for row in sequences.completions], sequences.prompt_index, device)
        completions = [sequences.completions[row] for row in rows]
        prompt_lengths, lengths = ([len(tokens) for tokens in part] for part in (sequences.prompts, completions))
        shared, prompts = num_shared(sequences.prompts), sequences.prompts
        plan = Packed(prompt_lengths, lengths, [sequences.prompt_index[row] for row in rows], device, shared=shared)
        rests = (prompt[shared:] for prompt in prompts)
        packed = [token for part in (prompts[0][:shared], *rests, *completions) for token in part]
        targets = packed[len(packed) - sum(lengths) :]
        tokens, labels = torch.tensor(packed, device=device), torch.tensor(targets, device=device)
        of_logits = partial(token_logprobs, temperature=temperature, entropy=entropy, fused=self.fused)
        with policy.autocast():
            if policy.is_sharded or self.own_logits:  # FSDP gathers a layer's weights only within the model's forward
                logits = _own_logits(policy, tokens[None], plan.positions, plan, plan.predecessors)[0]  # (M, V)
                values = of_logits(logits, labels)
            else:
                before = self._hidden_of_row(policy, tokens, plan)[plan.predecessors]  # (M, D)
                values = in_chunks(lambda part, own: of_logits(policy.logits(part), own), before, labels, logit_chunk)
        return scatter(values[0], lengths, rows), scatter(values[1], lengths, rows)

    def prefill(self, policy: Policy, prompts: Sequence[list[int]]) -> tuple[Prefill, Tensor, int]:
        """Keys and values, logits (P, V) of the token after each prompt, and the number of tokens computed."""
        shared, longest, device = num_shared(prompts), max(map(len, prompts)), policy.device
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        positions = torch.arange(longest, device=device).expand_as(tokens)
        last = torch.tensor([len(prompt) - shared - 1 for prompt in prompts], device=device)
        plan = Prefill()
        if shared:
            self._prefilled(policy, tokens[:1, :shared], positions[:1, :shared], plan, last[:1] * 0)
            plan = Prefill(plan)
        logits = self._prefilled(policy, tokens[:, shared:], positions[:, shared:], plan, last)
        return plan, logits, shared + tokens[:, shared:].numel()

    def _prefilled(self, policy: Policy, tokens: Tensor, positions: Tensor, plan: Prefill, last: Tensor) -> Tensor:
        """Logits (P, V) after the `last` (P,) of the tokens (P, L)."""
        rows = torch.arange(len(tokens), device=policy.device)
        if self.own_logits:
            kept, which = last.unique(return_inverse=True)
            return _own_logits(policy, tokens, positions, plan, kept)[rows, which]
        return policy.logits(policy.hidden(tokens, positions, plan)[rows, last])

    def step(self, policy: Policy, longest: int, *, in_place: bool = False) -> Callable[[Tensor, Tensor, Plan], Tensor]:
        """A function that decodes a token per row: tokens (B,), positions (B,) below `longest`, plan -> logits (B, V).

        With `in_place` it reads the model's weights at every call; otherwise it uses the current ones.
        """
        model = policy.model
        if llama.fits(model) and (in_place or _can_merge(policy)):
            # On a CPU, a narrow model loses more to conversions than it gains from bfloat16.
            wide = policy.device.type != "cpu" or model.config.hidden_size >= WIDE
            converted = policy.precision == "bf16-master" and wide and not in_place and policy.adapter is None
            dtype = torch.bfloat16 if converted else model.dtype
            with lora.merged_weights(model) if policy.adapter and not in_place else nullcontext():
                written = llama.Pass(
                    model, longest=longest, dtype=dtype, in_place=in_place, fused=self.fused and in_place
                )
            return lambda tokens, positions, plan: written.logits(written.hidden(tokens, positions, plan))
        if self.own_logits:
            return lambda tokens, positions, plan: _own_logits(policy, tokens[:, None], positions[:, None], plan)[:, 0]
        return lambda tokens, positions, plan: policy.logits(
            policy.hidden(tokens[:, None], positions[:, None], plan)[:, 0]
        )

    def _hidden_of_row(self, policy: Policy, tokens: Tensor, plan: Packed) -> Tensor:
        """Final hidden states (N, D) of one packed row (N,). With an adapter, peft's own layers compute them."""
        model, recomputed = policy.model, bool(policy.model.is_activation_checkpointing)
        fits = llama.fits(model) and policy.adapter is None
        if self.fused and fits:
            written = llama.Pass(
                model, longest=plan.longest, dtype=model.dtype, in_place=True, fused=True, checkpointing=recomputed
            )
        elif policy.device.type == "cpu" and fits and not recomputed and model.config.hidden_size < WIDE:
            dtype = torch.float32 if policy.precision == "float32" else torch.bfloat16
            written = llama.Pass(model, longest=plan.longest, dtype=dtype)
        else:
            return policy.hidden(tokens[None], plan.positions, plan)[0]
        return written.hidden(tokens, plan.positions[0], plan, packed=True)


def can_step_in_place(policy: Policy) -> bool:
    """Whether `PackedPath.step` works without copies of the weights; 4-bit weights were never captured."""
    return llama.fits(policy.model) and not (policy.adapter and policy.adapter.nf4)


def _can_merge(policy: Policy) -> bool:
    """Whether an adapter can be merged into the weights: 16 bits would round small changes away."""
    return policy.adapter is None or (not policy.adapter.nf4 and policy.model.dtype == torch.float32)


def _own_logits(policy: Policy, tokens: Tensor, positions: Tensor, plan: Plan, kept: Tensor | int = 0) -> Tensor:
    """Logits (B, T', V) at the positions `kept` (T',), all if 0, by the model's own forward."""
    output = policy.model(input_ids=tokens, position_ids=positions, use_cache=False, plan=plan, logits_to_keep=kept)
    return cast("Tensor", output.logits)
