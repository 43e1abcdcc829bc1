"""Who is measured: one small class each."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from .base import Provider, Unavailable
from .flash_attn import FlashAttention
from .flex import Flex
from .liger import Liger
from .ours import Ours, OursCompiled
from .quack import Quack
from .torch_eager import Compiled, CublasLt, Sdpa, Torch, Varlen
from .xformers import XFormers

_TORCH = (
    Torch(),
    Compiled("torch.compile", None),
    Compiled("torch.compile max-autotune", "max-autotune-no-cudagraphs"),
)
OURS = (Ours(None), Ours("triton"), Ours("cuda"))
_FLASH = (FlashAttention(2), FlashAttention(4))

NORMS = (*_TORCH, *OURS, Liger(), Quack())
ATTENTION = (
    *_TORCH,
    Sdpa("sdpa flash", SDPBackend.FLASH_ATTENTION, on_cpu=True),
    Sdpa("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION),
    Sdpa("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("sdpa math", SDPBackend.MATH, on_cpu=True),
    Flex(),
    *OURS,
    *_FLASH,
    XFormers(),
)
VARLEN = (*_TORCH, Varlen(), Flex(), *OURS, *_FLASH, XFormers())
DECODE = (*_TORCH, *OURS, *_FLASH)
LAYERS = (*_TORCH, *OURS, OursCompiled())
PRODUCTS = (*_TORCH, CublasLt(), *OURS, Liger())

__all__ = ["ATTENTION", "DECODE", "LAYERS", "NORMS", "OURS", "PRODUCTS", "VARLEN", "Provider", "Unavailable"]
