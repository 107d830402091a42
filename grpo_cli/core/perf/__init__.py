"""Micro-batches, the memory plan and the cost of a step."""
