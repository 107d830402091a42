"""Every causal architecture of transformers runs as its own forward does, on one of the paths, or is refused."""

import pytest
from architectures import tiny_model
from test_selfcheck import PROMPTS, as_loaded
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.sampling.selfcheck import LARGEST, PATHS, checked

QUICK = [
    *("apertus", "bart", "bert", "bloom", "cohere", "cohere2", "ctrl", "deepseek_v3", "diffllama", "doge", "gemma"),
    *("gemma2", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "hrm_text", "llama"),
    *("mistral", "mixtral", "mpt", "nanochat", "olmo2", "openai-gpt", "opt", "phi", "phi3", "qwen2", "qwen3"),
    *("roberta", "smollm3", "stablelm", "xglm"),
]
OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(QUICK))


def outcome_of(kind: str) -> tuple[str, float]:
    """The path of a tiny random model, or "refused", and its largest difference; skips what has no tiny model."""
    try:
        model = tiny_model(kind)
    except Exception as error:  # what configurations raise has no common base
        pytest.skip(f"no tiny model: {type(error).__name__}: {error}"[:120])
    try:
        _, outcome = checked(as_loaded(model), PROMPTS)
    except CountdownError as error:
        assert type(model).__name__ in error.message and "\n" not in error.message
        return "refused", 0.0
    return outcome.path, outcome.gap


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_an_architecture_is_computed_right_or_refused(kind: str) -> None:
    path, gap = outcome_of(kind)
    assert path in {*PATHS, "refused"} and gap <= LARGEST
