"""countdown: teach a language model to solve countdown puzzles with GRPO."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("countdown-grpo")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
