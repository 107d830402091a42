"""The built-in model, and the recipe that trained it."""
