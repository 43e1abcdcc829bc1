"""Nested tensors of the strided layout, which torch.nn.TransformerEncoder makes of padded batches in eval."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences of a nested tensor as [N, longest, E], zero behind their ends, and where those ends are:
    bool [N, longest], True = padding, as a key_padding_mask says it. Their lengths lie on the host."""
    rows = nested.to_padded_tensor(0.0)
    lengths = nested._nested_tensor_size()[:, :1]
    padding = torch.arange(rows.shape[1]) >= lengths
    return rows, padding.to(rows.device, non_blocking=True)


def unpadded(rows: Tensor, padding: Tensor) -> Tensor:
    """The nested tensor of the sequences in ``rows`` [N, longest, E]; ``padding`` as ``padded`` made it."""
    return torch._nested_tensor_from_mask(rows, padding.logical_not(), mask_check=False)
