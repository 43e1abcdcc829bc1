"""Linear layer + activation in pure PyTorch: forward and explicit backward.

The yardstick of every kernel, and the path of double backward: each function is differentiable by autograd.
Products, activations and sums are in float32, or in float64 for float64 inputs. Formulas: Hendrycks and
Gimpel, Gaussian Error Linear Units (arXiv 1606.08415); Shazeer, GLU Variants Improve Transformer (arXiv
2002.05202); torch.nn.functional.gelu, silu and relu, but with their limits at infinity, where torch's are
NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...dropout import dropout_mask, dropout_scale
from .call import ACTIVATIONS, FeedForwardCall

# Beyond it every activation has reached its limit, in float64 too, and no power of it overflows float32.
_SATURATION = 1000.0


def unsupported(call: FeedForwardCall) -> list[str]:
    """The reference serves every call that reaches it outside functorch."""
    return [] if call.obstacle is None else [call.obstacle]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or float64, which autocast would make a product in its own dtype."""
    # The meta device has no autocast that could be turned off.
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):
        return _wide(a) @ _wide(b)


def _sigmoid_argument(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """v and v' for which the function is x * sigmoid(v(x)): silu, and GELU by tanh, as 1 + tanh(u) is
    2 * sigmoid(2u)."""
    if function == "silu":
        return x, torch.ones_like(x)
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    return scale * (x + cubic * x**3), scale * (1 + 3 * cubic * x**2)


def activate(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """The activation of a float32 or float64 tensor and its derivative.

        relu       max(x, 0)              x > 0
        gelu       x * Phi(x)             Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi)
        gelu_tanh  x * sigmoid(v)         s + x * s * (1 - s) * v',  v = 2 sqrt(2 / pi) (x + 0.044715 x^3)
        silu       x * sigmoid(x)         s + x * s * (1 - s)

    with Phi(x) = (1 + erf(x / sqrt 2)) / 2 and s = sigmoid(v).
    """
    if function == "relu":
        return torch.where(x <= 0, 0.0, x), torch.where(x <= 0, 0.0, 1.0).to(x.dtype)
    inside = x.clamp(-_SATURATION, _SATURATION)
    if function == "gelu":
        share = 0.5 * (1 + torch.erf(inside * math.sqrt(0.5)))
        slope = share + inside * torch.exp(-0.5 * inside**2) / math.sqrt(2 * math.pi)
    else:
        v, dv = _sigmoid_argument(inside, function)
        share = torch.sigmoid(v)
        slope = share + inside * share * torch.sigmoid(-v) * dv
    return x.clamp(min=-_SATURATION) * share, slope


def _dropped(hidden: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if seed is None:
        return hidden
    kept = dropout_mask(seed, hidden.shape[0], hidden.shape[1], dropout_p)
    return torch.where(kept, hidden * dropout_scale(dropout_p), 0.0)


def _halves(pre: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    if not gated:
        return _wide(pre), None
    gate, up = _wide(pre).chunk(2, dim=1)
    return gate, up


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wants_pre: bool,
    wants_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """pre = x @ weight.T + bias, rounded to x's dtype; hidden = dropout(act(pre)), gated: dropout(act(gate) *
    up) with the halves gate and up of pre.

    x: [M, K]. weight: [W, K], with W = H, or 2 * H where the activation is gated, gate rows first. bias: [W].
    seed: int64 [1], None without dropout. Returns hidden [M, H] and pre [M, W], both of x's dtype, each an
    empty tensor if not wanted. The activation is of the rounded pre, so that backward, which has no other,
    finds the same hidden.
    """
    function, gated = ACTIVATIONS[activation]
    pre = _product(x, weight.t())
    pre = (pre if bias is None else pre + _wide(bias)).to(x.dtype)
    hidden = x.new_empty(0)
    if wants_hidden:
        gate, up = _halves(pre, gated)
        activated, _ = activate(gate, function)
        hidden = _dropped(activated if up is None else activated * up, seed, dropout_p).to(x.dtype)
    return hidden, pre if wants_pre else x.new_empty(0)


def backward(
    dy: Tensor,
    weight: Tensor | None,
    pre: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wants_dpre: bool,
    wants_hidden: bool,
    wants_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of pre, from that of what was made of its hidden = dropout(act(pre)):

        dhidden = dropout(dy @ weight), the mask of forward        (without a weight: dropout(dy))
        dpre    = dhidden * act'(pre);          gated: dgate = dhidden * up * act'(gate), dup = dhidden *
                                                act(gate), side by side
        dbias   = sum over rows of dpre, unrounded

    dy: [M, N], or [M, H] without a weight. weight: [N, H], of the linear layer that took hidden. pre: [M, H],
    gated [M, 2 * H]. Returns dpre, hidden as forward made it, and dbias, all of pre's dtype, each an empty
    tensor if not wanted.
    """
    function, gated = ACTIVATIONS[activation]
    gate, up = _halves(pre, gated)
    dhidden = _wide(dy) if weight is None else _product(dy, weight)
    dhidden = _dropped(dhidden, seed, dropout_p)
    activated, slope = activate(gate, function)
    if up is None:
        # torch's own rule: no gradient at all where relu is off, not even of an infinite dy.
        dpre = torch.where(gate <= 0, 0.0, dhidden) if function == "relu" else dhidden * slope
    else:
        dpre = torch.cat((dhidden * up * slope, dhidden * activated), dim=1)
    # Three tensors of their own: the outputs of an operator may not share memory.
    hidden, dbias = pre.new_empty(0), pre.new_empty(0)
    if wants_hidden:
        hidden = _dropped(activated if up is None else activated * up, seed, dropout_p).to(pre.dtype)
    if wants_dbias:
        dbias = dpre.sum(dim=0).to(pre.dtype)
    return dpre.to(pre.dtype) if wants_dpre else pre.new_empty(0), hidden, dbias
