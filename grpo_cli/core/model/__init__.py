"""Models and tokenizers: loading, log-probabilities, attention."""
