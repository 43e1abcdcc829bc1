"""What tells a Transformer where a token stands: a vector for each position, added to the token's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks


class _PositionalEncoding(nn.Module):
    """What both encodings share: dropout(x + table[offset : offset + L])."""

    def __init__(self, d_model: int, dropout: float, max_len: int, batch_first: bool) -> None:
        super().__init__()
        name = type(self).__name__
        self.d_model = checks.check_size(name, "d_model", d_model, 1)
        self.max_len = checks.check_size(name, "max_len", max_len, 1)
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)

    def _table(self) -> Tensor:
        """[max_len, d_model]"""
        raise NotImplementedError

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """dropout(x + the vectors of positions offset, offset + 1, ...), in the dtype of x.

        x: [L, N, d_model], with batch_first [N, L, d_model], or unbatched [L, d_model]. offset: the position
        of the first token, an int or an int32 or int64 tensor [] or [N] on the device of x; the lengths of a
        KVCache in generation. Raises TypeError, RuntimeError (shapes, dtypes, devices) or ValueError (an
        offset below 0, a position of max_len or more; offsets on a GPU can't be looked at without waiting for
        it and fail there).
        """
        name = type(self).__name__
        checks.check_tensor(name, "x", x)
        checks.check_floating(name, "x", x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            batched = "[N, L, {0}]" if self.batch_first else "[L, N, {0}]"
            expected = f"{batched} or [L, {{0}}]".format(self.d_model)
            checks.fail(RuntimeError, name, "x", expected, list(x.shape))
        sequence_dim = 1 if self.batch_first and x.dim() == 3 else 0
        rows = self._rows(x, offset, x.shape[sequence_dim])  # [L, d_model] or [N, L, d_model]
        if not self.batch_first and x.dim() == 3:
            rows = rows.unsqueeze(1) if rows.dim() == 2 else rows.transpose(0, 1)
        return self.dropout((x + rows).to(x.dtype))

    def _rows(self, x: Tensor, offset: int | Tensor, length: int) -> Tensor:
        name = type(self).__name__
        if not isinstance(offset, Tensor):
            first = checks.check_size(name, "offset", offset, 0)
            self._check_end(first, length)
            return self._table()[first : first + length]
        if offset.dtype not in (torch.int32, torch.int64):
            checks.fail(TypeError, name, "offset", "an int, torch.int32 or torch.int64", offset.dtype)
        if offset.dim() > 0 and (x.dim() == 2 or offset.shape != (x.shape[0 if self.batch_first else 1],)):
            expected = "the shape []" if x.dim() == 2 else "the shape [] or [N], one for each sequence"
            checks.fail(RuntimeError, name, "offset", expected, list(offset.shape))
        checks.check_device(name, "offset", offset, x)
        if offset.is_cpu and offset.numel() > 0 and not torch.compiler.is_compiling():
            lowest, highest = (int(bound) for bound in offset.aminmax())
            checks.check_size(name, "offset", lowest, 0)
            self._check_end(highest, length)
        positions = offset.unsqueeze(-1) + torch.arange(length, device=x.device)  # [N, L] or [L]
        # Unlike indexing, this takes no position below 0, wherever it is run.
        return F.embedding(positions, self._table())

    def _check_end(self, first: int, length: int) -> None:
        if first + length > self.max_len:
            expected = (
                f"at most {max(self.max_len - first, 0)} tokens at offset {first} (max_len {self.max_len})"
            )
            checks.fail(ValueError, type(self).__name__, "x", expected, length)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, batch_first={self.batch_first}"


class PositionalEncoding(_PositionalEncoding):
    """Sines and cosines of geometrically spaced wavelengths, added to the tokens' vectors.

        y = dropout(x + P[offset : offset + L])
        P[t, 2i] = sin(t / 10000^(2i / d_model))        P[t, 2i + 1] = cos(t / 10000^(2i / d_model))

    (Vaswani et al., Attention Is All You Need, arXiv 1706.03762, 3.5.) torch.nn has no such layer; this one
    takes torch.nn.Transformer's conventions. d_model: the vectors' size, odd ones too (the last sine has no
    cosine); dropout: of the sum, in training; max_len: positions there are; batch_first: forward takes [N, L,
    d_model] instead of [L, N, d_model]; device, dtype: of the table, which is rounded once, from float64.

    It has no parameters and nothing in its state_dict: the table is a buffer, ``table`` [max_len, d_model],
    that ``reset_parameters`` computes again, after to_empty() for one. Raises TypeError or ValueError for
    sizes below 1 and for a dropout outside [0, 1].
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        dropout: float = 0.1,
        max_len: int = 5000,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, dropout, max_len, batch_first)
        table = torch.empty(self.max_len, self.d_model, device=device, dtype=dtype)
        self.register_buffer("table", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Computes the table."""
        if self.table.is_meta:
            return
        position = torch.arange(self.max_len, dtype=torch.float64).unsqueeze(1)
        even = torch.arange(0, self.d_model, 2, dtype=torch.float64)
        angle = position / 10000.0 ** (even / self.d_model)  # [max_len, ceil(d_model / 2)]
        waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
        self.table.copy_(waves[:, : self.d_model])

    def _table(self) -> Tensor:
        return self.table


class LearnedPositionalEncoding(_PositionalEncoding):
    """A learned vector for each position, added to the tokens' vectors: y = dropout(x + weight[offset :
    offset + L]).

    The position embeddings of BERT and GPT-2. Constructor and forward are PositionalEncoding's. Its one
    parameter is ``weight`` [max_len, d_model], the key of a torch.nn.Embedding in its place; initial values:
    normal, of standard deviation 0.02 as in BERT (Devlin et al., arXiv 1810.04805).
    """

    def __init__(
        self,
        d_model: int,
        dropout: float = 0.1,
        max_len: int = 5000,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, dropout, max_len, batch_first)
        self.weight = nn.Parameter(torch.empty(self.max_len, self.d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values."""
        nn.init.normal_(self.weight, std=0.02)

    def _table(self) -> Tensor:
        return self.weight
