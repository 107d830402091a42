"""Countdown: puzzles, prompts, expressions and scores. Standard library only."""
