"""Peak memory against the plan, of a training whose completions grow: SmolLM2-135M's shape with random weights.

    python benchmarks/memory.py --folder /tmp/memory           40 steps of 8 x 8 completions, 65 to 260 tokens long
    python benchmarks/memory.py --folder /tmp/memory --memory 8     planned for 8 GB

Random weights end no completion, so the limit sets the length. Rewards are random too, so that every completion
contributes to the update. Each row appears as its step ends.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from grpo_cli.core.config.resolve import resolve
from grpo_cli.core.microbatch import resident
from grpo_cli.core.model.load import BUILTIN
from grpo_cli.core.rl.build import build, finish
from grpo_cli.core.rl.context import Context
from grpo_cli.core.rl.observer import Observer
from grpo_cli.core.rollout.params import SamplingParams

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
TOKENS = 260
GB = 1e9


def by_chance(completion: str, puzzle: object) -> float:
    """A reward of 0 or 1 that has nothing to do with the puzzle."""
    return float(zlib.crc32(completion.encode(errors="replace")) % 2)


def make_model(folder: Path) -> None:
    """Save a Llama of SmolLM2-135M's shape with random weights and the built-in model's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, **ends, tie_word_embeddings=True, max_position_embeddings=8192)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Rows(Observer):
    """Prints each step's length in tokens, resident memory, peak memory and seconds, and grows the next step's."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.largest = steps, 0, 0.0

    @property
    def limit(self) -> int:
        """From a quarter of TOKENS to all of them."""
        return round(TOKENS * (1 + 3 * self.done / max(1, self.steps - 1)) / 4)

    def message(self, text: str) -> None:
        print(text, flush=True)

    def step(self, metrics: Mapping[str, float], sample: Mapping[str, object]) -> None:
        self.done, self.largest = self.done + 1, max(self.largest, metrics["peak_memory"])
        cells = [f"{metrics['completion_length']:.0f}", f"{resident() / GB:.2f}", f"{metrics['peak_memory']:.2f}"]
        print(f"| {self.done} | {' | '.join(cells)} | {metrics['time/total']:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the model and the run: 3 GB")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--memory", type=float, default=0.0, help="GB to plan for; by default, a share of what is free")
    asked = parser.parse_args()
    model = asked.folder / "model"
    if not model.is_dir():
        make_model(model)
    flags: dict[str, object] = {
        "runs": str(asked.folder / "runs"),
        "model.model": str(model),
        "model.memory": asked.memory,
    }
    flags |= {"train.batch_size": 8, "train.num_generations": 8, "train.max_new_tokens": TOKENS, "loss.beta": 0.0}
    flags |= {"train.num_iterations": asked.steps, "train.eval_every": asked.steps, "train.eval_puzzles": 1}
    flags |= {"train.save_every": asked.steps, "train.save_minutes": 0.0, "reward.reward": f"{__file__}:by_chance"}
    rows = Rows(asked.steps)
    # No setting changes the limit between steps.
    SamplingParams.training = classmethod(  # type: ignore[method-assign,assignment]
        lambda cls, train: cls(rows.limit, train.temperature, train.num_generations)
    )
    with build(resolve(flags=flags).settings, "grown", overwrite=True, context=Context(observer=rows)) as trainer:
        assert trainer.memory is not None
        print(f"planned: {trainer.memory.peak / GB:.2f} GB in {trainer.memory.choices}")
        print("| step | tokens | resident, GB | peak, GB | seconds |\n|---|---|---|---|---|", flush=True)
        finish(trainer)
    print(f"largest peak: {rows.largest:.2f} GB of {trainer.memory.peak / GB:.2f} planned")


if __name__ == "__main__":
    main()
