"""GRPO: the algorithm, one update, the training loop and its session."""
