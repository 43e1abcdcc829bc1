"""Measured speed and memory of every op beside its peers; ``python -m bench`` or ``llmkernels bench``."""
