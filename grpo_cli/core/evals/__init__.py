"""Evaluation, paired comparison, statistics and contamination."""
