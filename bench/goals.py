"""The goals for an H200 that the project has set itself, and what records say of each."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .record import Record

_OURS = ("llmkernels*",)
_CUDNN, _FLEX = ("sdpa cudnn",), ("flex_attention",)
_EAGER, _COMPILED, _AUTOTUNED = ("torch",), ("torch.compile*",), ("torch.compile max-autotune",)


@dataclass(frozen=True)
class Goal:
    """At least ``target``: of ``quantity``, a column of a record, or, with ``against``, of how many times as
    fast as these providers. Of several shapes the worst counts, of several providers the fastest. variant
    and against_variant differ where two ways of ours are compared."""

    what: str
    target: float
    op: str
    variant: str
    direction: str
    shapes: tuple[str, ...]
    quantity: str = "share_of_matmul"
    providers: tuple[str, ...] = _OURS
    against: tuple[str, ...] = ()
    against_variant: str | None = None
    dtype: str = "bfloat16"

    @property
    def unit(self) -> str:
        if self.against:
            return "x"
        return {"share_of_matmul": "of matmul", "share_of_copy": "of copy"}[self.quantity]


class Outcome(NamedTuple):
    """value: None where one of the shapes was not measured."""

    goal: Goal
    value: float | None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        ratio = self.value / self.goal.target - 1
        if ratio >= 0:
            return f"met by {100 * ratio:.1f} %"
        return f"missed by {-100 * ratio:.1f} %"


def _norms() -> tuple[Goal, ...]:
    def shapes(*widths: int) -> tuple[str, ...]:
        return tuple(f"{max(1, min(32768, 2**28 // n))}x{n}" for n in widths)

    forward, backward = shapes(2048, 4096, 8192, 16384, 32768, 65536), shapes(1024, 2048, 4096, 8192, 16384)
    norm = ("layer_norm", "layer_norm")
    fused = ("add_layer_norm", "dropout_add_layer_norm")
    name = "add + dropout + LayerNorm"
    return (
        Goal("LayerNorm forward, N 2k to 65k", 0.97, *norm, "forward", forward, "share_of_copy"),
        Goal("LayerNorm backward, N 1k to 16k", 0.90, *norm, "backward", backward, "share_of_copy"),
        Goal("... against torch eager", 1.6, *norm, "backward", backward, against=_EAGER),
        Goal("... against torch.compile", 1.1, *norm, "backward", backward, against=_COMPILED),
        Goal(f"{name} forward, N 2k to 65k", 0.95, *fused, "forward", forward, "share_of_copy"),
        Goal(f"{name} backward, N 1k to 16k", 0.88, *fused, "backward", backward, "share_of_copy"),
    )


def _attention() -> tuple[Goal, ...]:
    long, short = ("1x16384",), ("8x2048",)
    full, causal = ("attention", "full d128"), ("attention", "causal d128")
    points = ((full, long, "d128 16k"), (causal, long, "d128 16k causal"), (causal, short, "d128 2k causal"))
    found = []
    for direction, shares, speed_ups in (
        ("forward", (0.90, 0.86, 0.64), (1.01, 1.01, 1.01)),
        ("backward", (0.80, 0.76, 0.55), (1.03, 1.03, 1.15)),
    ):
        for (which, shapes, name), share, speed_up in zip(points, shares, speed_ups, strict=True):
            what = f"attention {direction} {name}"
            found.append(Goal(what, share, *which, direction, shapes))
            found.append(Goal("... against cuDNN", speed_up, *which, direction, shapes, against=_CUDNN))
    atomics = "causal d128, atomics"
    triton = ("llmkernels triton",)
    return (
        *found,
        Goal("attention forward d64 16k", 0.69, "attention", "full d64", "forward", long),
        Goal(
            *("reproducible against atomic backward", 0.90, *causal, "backward", long),
            against=_OURS,
            against_variant=atomics,
        ),
        Goal("Triton attention forward d128", 0.71, *full, "forward", long, providers=triton),
        Goal("Triton attention backward d128", 0.55, *full, "backward", long, providers=triton),
        Goal("... against FlexAttention", 1.15, *full, "backward", long, providers=triton, against=_FLEX),
        Goal(
            *("decode, batch >= 32, grouped heads", 0.91, "attention_decode", "GQA 32/8", "forward"),
            ("32x4096", "32x32768", "128x4096"),
            "share_of_copy",
        ),
    )


def _products_and_layers() -> tuple[Goal, ...]:
    gelu = ("feed_forward", "gelu", "both")
    widths = {1024: 1.13, 2048: 1.07, 4096: 1.03, 8192: 1.01}
    layer = ("encoder_layer", "post-norm", "both", ("8x2048",))
    return (
        *(
            Goal(f"feed-forward, d {d}, against eager", target, *gelu, (f"8192x{d}",), against=_EAGER)
            for d, target in widths.items()
        ),
        Goal(
            "... never below max-autotune",
            0.99,
            *gelu,
            tuple(f"8192x{d}" for d in widths),
            against=_AUTOTUNED,
        ),
        Goal("encoder layer training step against torch.nn", 1.5, *layer, against=_EAGER),
        Goal("... against torch.compile", 1.15, *layer, against=_COMPILED),
    )


GOALS = (*_attention(), *_norms(), *_products_and_layers())
HOST_OVERHEAD = "host overhead of a call, at most torch's own"


def is_ours(record: Record) -> bool:
    """Whether a kernel of this package served it: by default many a call is torch's."""
    kernels = {"cuda", "triton"} & set(record.served_by.split(", "))
    return record.provider.startswith("llmkernels") and bool(kernels)


def _found(
    records: Sequence[Record], goal: Goal, shape: str, variant: str, providers: tuple[str, ...]
) -> list[Record]:
    wanted = (goal.op, variant, goal.direction, shape, goal.dtype)
    return [
        r
        for r in records
        if (r.op, r.variant, r.direction, r.shape, r.dtype) == wanted
        and r.match
        and r.median_seconds is not None
        and (is_ours(r) or not r.provider.startswith("llmkernels"))
        and any(fnmatch.fnmatchcase(r.provider, pattern) for pattern in providers)
    ]


def outcome(goal: Goal, records: Sequence[Record]) -> Outcome:
    """What the records say of a goal."""
    values = []
    for shape in goal.shapes:
        ours = _found(records, goal, shape, goal.variant, goal.providers)
        if not ours:
            return Outcome(goal, None)
        best = min(ours, key=lambda record: record.median_seconds or 0.0)
        if not goal.against:
            value = getattr(best, goal.quantity)
            if value is None:
                return Outcome(goal, None)
            values.append(value)
            continue
        others = _found(records, goal, shape, goal.against_variant or goal.variant, goal.against)
        if not others:
            return Outcome(goal, None)
        fastest = min(record.median_seconds or 0.0 for record in others)
        values.append(fastest / (best.median_seconds or 0.0))
    return Outcome(goal, min(values))
