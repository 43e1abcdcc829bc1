"""What every op's Triton kernels share: where they can run, and the facts a launch depends on."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides at its own import between compiling and interpreting its functions; ours follow the same
# choice.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
if INTERPRETED:
    from . import interpreter

    interpreter.install()

# What the launchers assume of the machine under the interpreter: a table row, and enough programs that
# several share the rows of even a small problem.
_INTERPRETED_ARCHITECTURE = 90
_INTERPRETED_PROCESSORS = 2
_OLDEST_ARCHITECTURE = 80
_LOG2E = tl.constexpr(1.4426950408889634)


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as Triton names it: 90 for sm_90."""
    if device.type != "cuda":
        return _INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context to launch in: Triton takes the current device's stream, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def device_obstacles(device: torch.device) -> list[str]:
    """Why Triton kernels can't run there, one sentence a reason; empty if they can."""
    if device.type == "cpu":
        needed = "set TRITON_INTERPRET=1 before triton is imported"
        return [] if INTERPRETED else [f"on a CPU Triton kernels run only through the interpreter: {needed}"]
    if device.type != "cuda" or torch.version.hip is not None:
        name = "a HIP device" if device.type == "cuda" else device.type
        return [f"the input is on {name}; the Triton kernels serve NVIDIA GPUs"]
    found = architecture(device)
    if found < _OLDEST_ARCHITECTURE:
        return [f"the GPU is sm_{found}; the Triton kernels need sm_{_OLDEST_ARCHITECTURE} or newer"]
    return []


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32 operands: "ieee", exactly, or "tf32" where torch's own switch
    (allow_tf32, fp32_precision, set_float32_matmul_precision) lets cuBLAS. Products of 16-bit operands are
    always exact."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a tile holds a head in: what tl.arange and tl.dot ask for."""
    return max(16, 1 << (head_dim - 1).bit_length())


@triton.jit
def known_multiple(size, VEC: tl.constexpr):
    """``size``, a multiple of VEC, in a form from which the compiler concludes that it is one."""
    return size // VEC * VEC


def vector_width(dtypes: tuple[torch.dtype | None, ...], *sizes: int) -> int:
    """How many elements one thread may read at once: a power of two that divides the row length and the row
    strides.

    Triton by itself sees divisibility by 16 and nothing less, and would read rows of 1000 element by element;
    the kernels are told this number instead. It is limited to 16 bytes of the widest dtype, not of each: then
    tiles of 16-bit and 32-bit tensors have one layout in the registers and meet without an exchange through
    shared memory.
    """
    bits = 4 if torch.float32 in dtypes else 8
    for size in sizes:
        bits |= size
    return bits & -bits


@triton.jit
def kept_by_dropout(seed_ptr, rows, first_column, N, threshold, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps: word j % 4 of Philox-4x32-7 at counter row * ceil(N / 4) + j // 4, of
    which the upper 31 bits are compared with the threshold. first_column is a multiple of 4."""
    offs_quad = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    quads = rows[:, None] * ((N + 3) // 4) + offs_quad[None, :]  # int64 [ROWS, BLOCK_N / 4]
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), quads, n_rounds=7)
    threshold = threshold.to(tl.uint32)
    even = tl.interleave((w0 >> 1) >= threshold, (w2 >> 1) >= threshold)  # [ROWS, BLOCK_N / 2]
    odd = tl.interleave((w1 >> 1) >= threshold, (w3 >> 1) >= threshold)
    return tl.interleave(even, odd)  # [ROWS, BLOCK_N]


@triton.jit
def tanh(x):
    """tanh to float32's last places: for small x its odd polynomial (as in Cephes), which 1 - 2 / (e^2x + 1)
    would round away."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    tail = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * _LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, series * square * x + x, tl.where(x < 0, -tail, tail))
