"""The CUDA C++ kernels of csrc/attention; signatures, shapes and results as reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension
from .call import AttentionCall, Settings, new_rows, sink_gradient

# csrc/attention/attention.h: BiasKind.
_BIAS_KINDS = {**extension.DTYPE_CODES, torch.bool: 3}
_NO_BIAS = (0, 2, 0, 0, 0, 0)
_CHUNK_BYTES = 16
_LARGEST_ROW_STRIDE = 2**29
# Rows or columns of a bias that one tile reaches over; offsets within them have 32 bits.
_BIAS_TILE = 256

_Operand = tuple[int, int, int, int]  # address and strides of batch, head and row


def unsupported(call: AttentionCall) -> list[str]:
    """The reasons of all kernels, and those of the compiled module: missing, or not for this device."""
    reasons = call.unsupported_by_kernels()
    obstacle = extension.device_obstacle(call.device)
    return reasons if obstacle is None else [*reasons, obstacle]


def _readable(tensor: Tensor) -> Tensor:
    """``tensor`` [B, H, L, D], copied unless its rows lie in one piece and begin at multiples of 16 bytes, as
    asynchronous copies want them."""
    size = tensor.element_size()
    if (
        (tensor.stride(3) == 1 or tensor.shape[3] <= 1)
        and tensor.data_ptr() % _CHUNK_BYTES == 0
        and tensor.stride(2) < _LARGEST_ROW_STRIDE
        and all(stride * size % _CHUNK_BYTES == 0 for stride in tensor.stride()[:3])
    ):
        return tensor
    *leading, columns = tensor.shape
    chunk = _CHUNK_BYTES // size
    copy = tensor.new_empty((*leading, -(-columns // chunk) * chunk))[..., :columns]
    return copy.copy_(tensor)


def _operand(tensor: Tensor) -> _Operand:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _addressable_bias(bias: Tensor) -> Tensor:
    return bias if max(bias.stride()[2:]) * _BIAS_TILE < 2**31 else bias.contiguous()


def _bias_operand(bias: Tensor | None) -> tuple[int, ...]:
    """Address, kind and strides, 0 where it is broadcast."""
    if bias is None:
        return _NO_BIAS
    strides = (0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
    return bias.data_ptr(), _BIAS_KINDS[bias.dtype], *strides


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sequences(query: Tensor, cu_seqlens_q: Tensor | None) -> int:
    return query.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1


def _sizes(
    query: Tensor, value: Tensor, alibi_slopes: Tensor | None, cu_seqlens_q: Tensor | None, settings: Settings
) -> tuple[int, ...]:
    """BoundSizes of csrc/attention/bindings.h."""
    heads, kv_heads = query.shape[1], value.shape[1]
    return (
        _sequences(query, cu_seqlens_q),
        heads,
        heads // max(kv_heads, 1),
        query.shape[3],
        value.shape[3],
        query.shape[2],
        value.shape[2],
        settings.max_seqlen_q,
        settings.max_seqlen_k,
        0 if alibi_slopes is None or alibi_slopes.shape[0] == 1 else alibi_slopes.stride(0),
        settings.left,
        settings.right,
        int(settings.bottom_right),
        extension.DTYPE_CODES[query.dtype],
        int(torch.backends.cuda.matmul.fp32_precision != "tf32"),
    )


def _numbers(settings: Settings) -> tuple[float, float, float]:
    return settings.scale, settings.softcap, settings.dropout_p


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """reference.forward by the kernels of csrc/attention: same arguments, same results (out, lse)."""
    out = new_rows(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0 or _sequences(query, cu_seqlens_q) == 0:
        return out, lse
    query, key, value = _readable(query), _readable(key), _readable(value)
    bias = None if bias is None else _addressable_bias(bias)
    device = max(query.get_device(), 0)
    extension.load().attention_forward(
        *map(_operand, (query, key, value, out)),
        lse.data_ptr(),
        _bias_operand(bias),
        tuple(map(_address, (alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k))),
        _sizes(query, value, alibi_slopes, cu_seqlens_q, settings),
        _numbers(settings),
        device,
        extension.current_stream(device),
    )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: Settings,
    bias_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """reference.backward by the kernels of csrc/attention: same arguments, same results (dquery, dkey,
    dvalue, dbias, dsinks), made from out and lse. Nothing is added atomically, whatever ``deterministic``
    says."""
    dquery, dkey, dvalue = (new_rows(tensor, tensor.shape[3]) for tensor in (query, key, value))
    wants_bias = bias is not None and bias_grad
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_grad else query.new_empty(0)
    lse = lse.contiguous()
    statistics = lse.new_empty((2, *lse.shape))
    lse_log2, delta = statistics.unbind()
    if _sequences(query, cu_seqlens_q) == 0 or query.shape[1] == 0:
        return dquery.zero_(), dkey.zero_(), dvalue.zero_(), dbias, sink_gradient(sinks, lse, delta)
    dlse = None if dlse is None else dlse.contiguous()
    dout, out, query, key, value = map(_readable, (dout, out, query, key, value))
    bias = None if bias is None else _addressable_bias(bias)
    shape = (1, 1, 1, 1) if bias is None else bias.shape
    device = max(query.get_device(), 0)
    extension.load().attention_backward(
        *map(_operand, (query, key, value, dout, out)),
        tuple(map(_operand, (dquery, dkey, dvalue))),
        (lse.data_ptr(), _address(dlse), lse_log2.data_ptr(), delta.data_ptr()),
        (
            dbias.data_ptr() if wants_bias and dbias.numel() else 0,
            *shape[:2],
            int(shape[2] != query.shape[2]),
            int(shape[3] != key.shape[2]),
        ),
        query.shape[0],
        _bias_operand(bias),
        tuple(map(_address, (alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k))),
        _sizes(query, value, alibi_slopes, cu_seqlens_q, settings),
        _numbers(settings),
        device,
        extension.current_stream(device),
    )
    return dquery, dkey, dvalue, dbias, sink_gradient(sinks, lse, delta)
