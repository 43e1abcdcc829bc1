"""The feed-forward block of a Transformer on the kernels of llmkernels.ops.feed_forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks
from ._blocks import ACTIVATIONS, GATES, run_feed_forward
from ._calls import refuse_scripting

_NAME = "nn.FeedForward"


class FeedForward(nn.Module):
    """linear2(dropout(activation(linear1(x)))), what a Transformer layer applies to each position by itself.

    d_model: the width of input and output [*, d_model]. dim_feedforward: of the hidden layer. dropout: behind
    the activation, while training. activation: "relu", "gelu" (exact, by erf), "gelu_tanh" (its approximation
    by tanh), the gated "swiglu" and "geglu" (Shazeer, arXiv 2002.05202), or a function or module, which is
    recognised where it is one of the first three. A gated form takes the first half of linear1's rows as the
    gate and the second as what it multiplies: linear1.weight is [2 * dim_feedforward, d_model].

    Parameters linear1.{weight,bias} and linear2.{weight,bias}, with torch.nn.Linear's initial values.
    backend: None for the automatic choice, or the one this instance insists on, as in LayerNorm. Raises
    ValueError for an unknown activation and what the linear layers raise.
    """

    backend: str | None = None
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        names = (*ACTIVATIONS, *GATES)
        if isinstance(activation, str) and activation not in names:
            checks.fail(ValueError, _NAME, "activation", f"one of {', '.join(names)}", repr(activation))
        gated = isinstance(activation, str) and activation in GATES
        rows = 2 * dim_feedforward if gated else dim_feedforward
        self.linear1 = nn.Linear(d_model, rows, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def extra_repr(self) -> str:
        return "" if isinstance(self.activation, nn.Module) else f"activation={self.activation!r}"

    def forward(self, input: Tensor, *, backend: str | None = None) -> Tensor:
        """[*, d_model] to the same shape. backend: what the layer around this one insists on; the instance's
        own comes first."""
        backend = backend if self.backend is None else self.backend
        return run_feed_forward(
            _NAME, input, self.linear1, self.activation, self.dropout, self.linear2, backend
        )
