"""countdown: teach a language model to solve countdown puzzles with GRPO.

What is public is listed in docs/api.md; this module has `__version__` alone.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("countdown-grpo")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
