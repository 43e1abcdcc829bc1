"""The ops as a model writes them in torch: what torch's own providers run, and in float64 the yardstick."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Function, Outputs, Tensors

RMS_EPS = torch.finfo(torch.float32).eps


def layer_norm(tensors: Tensors) -> Tensor:
    x = tensors["input"]
    return F.layer_norm(x, x.shape[-1:], tensors["weight"], tensors["bias"])


def rms_norm(tensors: Tensors) -> Tensor:
    x = tensors["input"]
    return F.rms_norm(x, x.shape[-1:], tensors["weight"], RMS_EPS)


def add_layer_norm(dropout_p: float) -> Function:
    """The norm and the new residual."""

    def function(tensors: Tensors) -> Outputs:
        x = tensors["input"]
        z = tensors["residual"] + F.dropout(x, dropout_p)
        weight, bias = tensors["weight"].to(z.dtype), tensors["bias"].to(z.dtype)
        return F.layer_norm(z, x.shape[-1:], weight, bias).to(x.dtype), z

    return function


def visible(length: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """[L, L], True where a query sees a key."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance <= window) if window else seen


def attention(variant: Any) -> Function:
    """scaled_dot_product_attention where it has what the variant asks for, else its formula step by step."""
    if variant.is_torchs:
        return lambda tensors: F.scaled_dot_product_attention(**tensors, **variant.options())

    def function(tensors: Tensors) -> Tensor:
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        key, value = (t.repeat_interleave(variant.group, dim=1) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        if variant.softcap:
            scores = variant.softcap * torch.tanh(scores / variant.softcap)
        seen = visible(query.shape[2], variant.causal, variant.window, query.device)
        scores = scores.masked_fill(~seen, float("-inf"))
        if variant.sinks:
            sinks = tensors["sinks"].to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
        return weights @ value

    return function


def attention_varlen(variant: Any, bounds: list[int]) -> Function:
    """One sequence after the other."""

    def function(tensors: Tensors) -> Tensor:
        query, key, value = (tensors[name].transpose(0, 1)[None] for name in ("query", "key", "value"))
        outs = [
            F.scaled_dot_product_attention(
                *(t[:, :, first:last] for t in (query, key, value)),
                is_causal=variant.causal,
                enable_gqa=variant.group > 1,
            )
            for first, last in zip(bounds, bounds[1:], strict=False)
        ]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    return function


def attention_decode(variant: Any) -> Function:
    """As torch's users write a decoding step: keys gathered from their pages, and a mask where the lengths or
    the queries need one."""

    def function(tensors: Tensors) -> Tensor:
        query, keys, values = (tensors[name] for name in ("query", "key_cache", "value_cache"))
        table, mask = tensors.get("block_table"), None
        if table is not None:
            batch, heads, dim = query.shape[0], keys.shape[1], keys.shape[3]
            keys, values = (c[table].transpose(1, 2).reshape(batch, heads, -1, dim) for c in (keys, values))
        if variant.uneven or variant.page_size or variant.query_length > 1:
            rows = torch.arange(query.shape[2], device=query.device) - query.shape[2]
            positions = tensors["cache_seqlens"][:, None] + rows
            columns = torch.arange(keys.shape[2], device=query.device)
            mask = (columns <= positions[:, :, None])[:, None]
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)

    return function


def _activated(pre: Tensor, activation: str) -> Tensor:
    if activation in ("swiglu", "geglu"):
        gate, up = pre.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up
    if activation == "relu":
        return F.relu(pre)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_activation(activation: str) -> Function:
    return lambda tensors: _activated(
        F.linear(tensors["input"], tensors["weight"], tensors["bias"]), activation
    )


def feed_forward(activation: str, dropout_p: float) -> Function:
    def function(tensors: Tensors) -> Tensor:
        hidden = _activated(F.linear(tensors["input"], tensors["weight1"], tensors["bias1"]), activation)
        if dropout_p > 0:
            hidden = F.dropout(hidden, dropout_p)
        return F.linear(hidden, tensors["weight2"], tensors["bias2"])

    return function
