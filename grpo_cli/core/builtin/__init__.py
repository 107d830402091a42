"""The built-in model: the recipe that makes it, and what the recipe made."""
