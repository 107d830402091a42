"""countdown: teach a language model to solve countdown puzzles with GRPO."""

__version__ = "0.1.0"
