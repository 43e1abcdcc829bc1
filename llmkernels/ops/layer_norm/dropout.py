"""The numbers of dropout that every backend must agree on, to the bit."""

from __future__ import annotations


def dropout_threshold(dropout_p: float) -> int:
    """The 31-bit integer below which a random word drops its element."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def dropout_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by."""
    return 0.0 if dropout_p == 1 else 1.0 / (1.0 - dropout_p)
