"""Every causal architecture of transformers runs as its own forward does, on one of the paths, or is refused."""

import pytest
import transformers
from architectures import KINDS, NOT_RUN, documented, run

from grpo_cli.core.sampling.selfcheck import LARGEST, PATHS

QUICK = [
    "apertus", "bart", "bert", "bloom", "cohere", "cohere2", "ctrl", "deepseek_v3", "diffllama", "doge", "gemma",
    "gemma2", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "hrm_text",
    "llama", "mistral", "mixtral", "mpt", "nanochat", "olmo2", "openai-gpt", "opt", "phi", "phi3", "qwen2", "qwen3",
    "roberta", "smollm3", "stablelm", "xglm",
]  # fmt: skip
# The table is of transformers 5.24; before, gptj for instance takes the plain path.
OLDER = transformers.__version__.startswith("5.23.")


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK)]
)
def test_an_architecture_is_computed_right_or_refused(kind: str) -> None:
    result = run(kind)
    assert result.path in {*PATHS, *NOT_RUN}
    assert result.gap <= 3 * LARGEST, f"{result.path}: silently wrong"
    if kind in QUICK and not OLDER:
        assert result.path == documented()[kind]


def test_the_table_has_every_architecture() -> None:
    assert set(KINDS) <= documented().keys()
