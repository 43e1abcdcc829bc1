"""Dropout's random words and numbers, on which every backend of every op agrees to the bit.

An element is kept where the upper 31 bits of its word are at least ``dropout_threshold(dropout_p)``. Which
word is an element's own ``dropout_mask`` says for ops on rows; attention has its own rule. This is the
pure-PyTorch form; Triton and CUDA C++ have theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_ROUNDS = 7
_LOW = 0xFFFFFFFF


def dropout_threshold(dropout_p: float) -> int:
    """The 31-bit integer below which a random word drops its element."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def dropout_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by."""
    return 0.0 if dropout_p == 1 else 1.0 / (1.0 - dropout_p)


def _multiply_high_low(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit values that lie in int64, without an overflow of the sign
    bit."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_uint32(seed: Tensor, quads: Tensor) -> Tensor:
    """Philox-4x32-7 (Salmon et al., SC 2011): [..., 4] random 32-bit integers, in int64, of counters
    ``quads``.

    seed: int64 [1], the 64-bit key. quads: int64 of any shape, the low 64 bits of the counter.
    """
    c0, c1 = quads & _LOW, (quads >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply_high_low(c0, 0xD2511F53)
        high2, low2 = _multiply_high_low(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_mask(seed: Tensor, m: int, n: int, dropout_p: float) -> Tensor:
    """bool [m, n], True = kept. Element (i, j) takes word j % 4 of counter i * ceil(n / 4) + j // 4, so that
    no counter serves two rows; it is kept where the word's upper 31 bits are at least round(dropout_p *
    2^31)."""
    quads_per_row = (n + 3) // 4
    quads = torch.arange(m * quads_per_row, dtype=torch.int64, device=seed.device).view(m, quads_per_row)
    words = philox_uint32(seed, quads).reshape(m, quads_per_row * 4)[:, :n]
    return (words >> 1) >= dropout_threshold(dropout_p)
