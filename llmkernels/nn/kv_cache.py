"""The keys and values of the tokens that an attention layer has seen, so that generation computes each only
once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops.attention.api import attention
from ..ops.attention_decode.api import attention_decode

_NAME = "KVCache"


class KVCache:
    """The key-value cache of one attention layer: prefill, append and generation, for inference.

        caches = [KVCache(batch, capacity, num_heads, head_dim) for _ in model.layers]
        hidden = model(prompt, cache=caches)        # [batch, length, width]: the prompts at once
        hidden = model(token, cache=caches)         # [batch, 1, width]: then token by token, or several

    batch: sequences; capacity: the most tokens of each; num_heads: key heads, of which queries may have a
    multiple (query head h reads key head h // group); head_dim: their size. dtype, device: of the memory,
    torch's defaults if None.

    key, value: [batch, num_heads, capacity, head_dim], as ``llmkernels.attention_decode`` reads them in
    place. Each head's tokens lie one after the other. lengths: int32 [batch] on the device, the tokens held
    by each sequence, written in place, so that a captured CUDA graph sees it; what lies in key and value
    behind them was perhaps never written.

    Sequences may be of different lengths: pad the prompts on the right, prefill them together (no token sees
    what comes after it), and ``truncate`` the cache to their lengths. Each then goes on from its own end.

    Nothing but truncate() waits for a GPU. The capacity is checked on the host, by the length that the
    longest sequence has at most (``longest``), before anything is written: a call that doesn't fit raises and
    leaves the cache as it was. A replay of a CUDA graph runs no Python, so it isn't checked and isn't
    counted: tokens beyond the capacity are then dropped.

    Raises TypeError for sizes that aren't ints, ValueError for sizes below 1 (batch: below 0) and for a dtype
    that isn't floating point.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        shape = (
            checks.check_size(_NAME, "batch", batch, 0),
            checks.check_size(_NAME, "num_heads", num_heads, 1),
            checks.check_size(_NAME, "capacity", capacity, 1),
            checks.check_size(_NAME, "head_dim", head_dim, 1),
        )
        if dtype is not None and not dtype.is_floating_point:
            checks.fail(ValueError, _NAME, "dtype", "a floating-point dtype", dtype)
        # Made as plain tensors even in inference mode, so that they can be written to in any mode later.
        with torch.inference_mode(False), torch.no_grad():
            self.key = torch.empty(shape, dtype=dtype, device=device)
            self.value = torch.empty_like(self.key)
            self.lengths = torch.zeros(shape[0], dtype=torch.int32, device=device)
        self._longest = 0

    @property
    def batch(self) -> int:
        return self.key.shape[0]

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    @property
    def longest(self) -> int:
        """The length of the longest sequence, as far as the host knows without waiting for a GPU."""
        return self._longest

    def __repr__(self) -> str:
        batch, heads, capacity, head_dim = self.key.shape
        return (
            f"{_NAME}({batch}, {capacity}, {heads}, {head_dim}, dtype={self.key.dtype}, "
            f"device={str(self.key.device)!r}): {self._longest} tokens"
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Appends the keys and values of each sequence's next L tokens and lets each of their queries see
        every token up to itself: softmax(scale * query key^T) value, scale = 1 / sqrt(head_dim) if None.

        query: [batch, a multiple of num_heads, L, head_dim]; key, value: [batch, num_heads, L, head_dim]; any
        strides, in the cache's dtype and on its device. Returns [batch, query's heads, L, head_dim]. Under
        autocast they may be of another dtype and are taken as autocast has attention take them; the cache
        keeps its own.

        Several tokens into an empty cache go through ``llmkernels.attention``, all else through
        ``llmkernels.attention_decode``; backend is theirs. Raises TypeError (no tensors), RuntimeError
        (shapes, dtypes, devices; gradients asked for; a backend that can't serve) or ValueError (no room; an
        unknown backend), and then the cache is as it was.
        """
        kind = self.key.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            return self._attend_autocast(query, key, value, scale, backend, torch.get_autocast_dtype(kind))
        self._check(query, key, value)
        new_tokens = key.shape[2]
        if self._longest + new_tokens > self.capacity:
            room = f"at most {self.capacity - self._longest} more tokens (capacity {self.capacity})"
            checks.fail(ValueError, _NAME, "key", room, new_tokens)
        out: Any
        if self._longest == 0 and new_tokens > 1:
            grouped = query.shape[1] != key.shape[1]
            out = attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=grouped, backend=backend
            )
            with torch.no_grad():
                self.key[:, :, :new_tokens].copy_(key)
                self.value[:, :, :new_tokens].copy_(value)
        else:
            out = attention_decode(
                query, self.key, self.value, self.lengths, key=key, value=value, scale=scale, backend=backend
            )
        self.lengths.add_(new_tokens)
        self._longest += new_tokens
        return out

    def _attend_autocast(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        backend: str | None,
        lower: torch.dtype,
    ) -> Tensor:
        """``attend`` of what autocast makes of the three, in the cache's dtype, back in autocast's."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            checks.check_tensor(_NAME, name, tensor)
            checks.check_floating(_NAME, name, tensor)
        # Autocast leaves float64 alone.
        result = query.dtype if query.dtype == torch.float64 else lower
        query, key, value = (
            t if t.dtype == torch.float64 else t.to(lower).to(self.key.dtype) for t in (query, key, value)
        )
        with torch.autocast(self.key.device.type, enabled=False):
            return self.attend(query, key, value, scale=scale, backend=backend).to(result)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        batch, heads, _, head_dim = self.key.shape
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            checks.check_tensor(_NAME, name, tensor)
            if tensor.dim() != 4:
                expected = "4 dimensions [batch, heads, length, head_dim]"
                checks.fail(RuntimeError, _NAME, name, expected, list(tensor.shape))
            if tensor.dtype != self.key.dtype:
                checks.fail(RuntimeError, _NAME, name, f"{self.key.dtype} (as the cache)", tensor.dtype)
            if tensor.device != self.key.device:
                expected = f"device {self.key.device} (as the cache)"
                checks.fail(RuntimeError, _NAME, name, expected, tensor.device)
        length = query.shape[2]
        for name, tensor in (("key", key), ("value", value)):
            if tensor.shape != (batch, heads, length, head_dim):
                expected = f"the shape {[batch, heads, length, head_dim]} (as the cache, length as query)"
                checks.fail(RuntimeError, _NAME, name, expected, list(tensor.shape))
        if query.shape[0] != batch or query.shape[3] != head_dim or query.shape[1] % heads != 0:
            expected = f"the shape [{batch}, a multiple of {heads}, L, {head_dim}]"
            checks.fail(RuntimeError, _NAME, "query", expected, list(query.shape))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            raise RuntimeError(
                f"{_NAME}: it is for inference and has no gradient: call the model under torch.no_grad()"
            )

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        self.lengths.zero_()
        self._longest = 0

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keeps the first tokens of each sequence alone, as many as ``lengths`` says: after a prefill of
        padded prompts, or to take back what was tried out. The next token takes the place of the first
        dropped one.

        lengths: an int, or one for each sequence as a sequence or integer tensor [batch]. Raises TypeError
        for anything else, RuntimeError for another number of them, ValueError where one is below 0 or above
        the tokens held, and then the cache is as it was.
        """
        if isinstance(lengths, Tensor):
            if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
                checks.fail(TypeError, _NAME, "lengths", "integers", lengths.dtype)
            if lengths.shape != (self.batch,):
                checks.fail(RuntimeError, _NAME, "lengths", f"the shape [{self.batch}]", list(lengths.shape))
            wanted = lengths.tolist()
        elif isinstance(lengths, (list, tuple)):
            wanted = [checks.check_size(_NAME, "lengths", length, 0) for length in lengths]
            if len(wanted) != self.batch:
                checks.fail(RuntimeError, _NAME, "lengths", f"{self.batch} lengths", len(wanted))
        else:
            wanted = [checks.check_size(_NAME, "lengths", lengths, 0)] * self.batch
        held = self.lengths.tolist()
        if any(not 0 <= length <= most for length, most in zip(wanted, held, strict=True)):
            checks.fail(ValueError, _NAME, "lengths", f"from 0 to the {held} tokens held", wanted)
        self.lengths.copy_(torch.tensor(wanted, dtype=torch.int32))
        self._longest = max(wanted, default=0)

    def reorder(self, indices: Tensor) -> None:
        """Sequence i becomes what sequence indices[i] was: the beams that a step of a beam search goes on
        with.

        indices: int32 or int64 [batch] on the cache's device; one sequence may be taken several times. In
        place, so tensors and captured CUDA graphs that refer to the cache go on doing so. Raises TypeError
        (no tensor), RuntimeError (shape, dtype, device) or, on the CPU, IndexError (no such sequence), and
        then the cache is as it was.
        """
        checks.check_tensor(_NAME, "indices", indices)
        if indices.dtype not in (torch.int32, torch.int64):
            checks.fail(RuntimeError, _NAME, "indices", "torch.int32 or torch.int64", indices.dtype)
        if indices.shape != (self.batch,):
            checks.fail(RuntimeError, _NAME, "indices", f"the shape [{self.batch}]", list(indices.shape))
        if indices.device != self.key.device:
            expected = f"device {self.key.device} (as the cache)"
            checks.fail(RuntimeError, _NAME, "indices", expected, indices.device)
        taken = [held.index_select(0, indices) for held in (self.key, self.value, self.lengths)]
        for held, chosen in zip((self.key, self.value, self.lengths), taken, strict=True):
            held.copy_(chosen)
