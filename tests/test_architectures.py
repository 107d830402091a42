"""Every causal architecture of transformers runs as its own forward does, on one of the paths, or is refused."""

import json
import math
from pathlib import Path

import pytest
import transformers
from architectures import KINDS, NOT_RUN, TRAINABLE, documented, run, tiny_model
from conftest import Command

from grpo_cli.core.rollout.selfcheck import LARGEST, PATHS

QUICK = [
    "bart", "bert", "bloom", "cohere", "cohere2", "deepseek_v3", "gemma", "gemma2", "gpt2", "gpt_neox", "gpt_oss",
    "gptj", "granite", "llama", "mistral", "mixtral", "mpt", "olmo2", "opt", "phi3", "qwen2", "qwen3", "smollm3",
]  # fmt: skip
TRAINED = ["bert", "bloom", "falcon_mamba", "gpt2", "mixtral"]
NOT_READ = ("emu3", "mllama", "minimax")  # transformers does not read what it saved of them
STEP = ["--precision", "float32", "--style", "zero-shot", "--batch-size", "2", "--num-generations", "4"]
STEP += ["--max-new-tokens", "4", "--num-iterations", "1", "--eval-puzzles", "2", "--reward", "reward.py:varied"]
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


@pytest.mark.parametrize(
    "kind", [*TRAINED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in TRAINED)]
)
def test_the_command_trains_an_architecture_or_refuses_it(
    kind: str, tiny_folder: Path, tmp_path: Path, countdown: Command
) -> None:
    if documented()[kind] == "no tiny model":
        pytest.skip("no tiny model")
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "model")
    tiny_model(kind, TRAINABLE).save_pretrained(tmp_path / "model")
    Path("reward.py").write_text("def varied(completion, puzzle):\n    return sum(map(ord, completion)) % 7\n")
    result = countdown("train", "--model", "model", "--run", "one", *STEP)
    if documented()[kind] == "refused" or kind in NOT_READ:
        assert result.code == 2 and not Path("runs/one").exists()
        return
    assert result.code == 0, result.err
    step = json.loads(Path("runs/one/metrics.jsonl").read_text().splitlines()[-1])
    assert step["step"] == 1 and (step["grad_norm"] > 0 or step["zero_variance"] == 1)
    assert all(math.isfinite(value) for value in step.values())
