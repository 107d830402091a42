"""The shared core: it returns values and raises, and never prints, exits or reads the environment."""
