"""Make the engine that the settings name."""

from __future__ import annotations

from grpo_cli.core.config.settings import Model
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.engine import Engine
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.vllm import VllmEngine

PROMPT = 4096  # tokens of the longest prompt that vLLM keeps room for


def make_engine(policy: Policy, settings: Model, *, max_new_tokens: int, ranks: int = 1) -> Engine:
    """The engine of `settings.rollout`; raises CountdownError if it cannot be used."""
    if settings.rollout == "local":
        return LocalEngine(policy)
    if ranks > 1:
        raise CountdownError("`--rollout vllm` runs in one process", "use `--rollout local` under torchrun")
    most = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    return VllmEngine(policy, min(most, PROMPT + max_new_tokens), settings.vllm_memory)
