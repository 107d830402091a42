"""Make the engine that the settings name."""

from __future__ import annotations

from grpo_cli.core.config.settings import Settings
from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.rollout.engine import Engine
from grpo_cli.core.rollout.local import LocalEngine
from grpo_cli.core.rollout.vllm import VllmEngine
from grpo_cli.core.rollout.vllm_server import Server, ServerEngine
from grpo_cli.core.world import World

PROMPT = 4096  # tokens of the longest prompt that vLLM keeps room for


def make_engine(
    policy: Policy,
    settings: Settings,
    *,
    max_new_tokens: int,
    learner: Policy | None = None,
    world: World | None = None,
) -> Engine:
    """The engine of `settings.model.rollout`; raises CountdownError if it cannot be used.

    `learner`: what is trained, if not the policy itself but its sharded version.
    """
    model, world = settings.model, world or World()
    if model.rollout == "local":
        return LocalEngine(policy)
    if model.vllm_url != "none":
        folder = None if model.vllm_folder == "none" else model.vllm_folder
        server = Server(model.vllm_url, settings.ranks.timeout)
        return ServerEngine(policy, learner or policy, server, folder, world)
    if world.size > 1:
        raise CountdownError(
            "vLLM runs in one process", "give `--vllm-url` of a server, or use `--rollout local` under torchrun"
        )
    most = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    return VllmEngine(policy, min(most, PROMPT + max_new_tokens), model.vllm_memory)
