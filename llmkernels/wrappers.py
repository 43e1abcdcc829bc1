"""`llmkernels doctor --wrappers`: every instruction that the CUDA C++ kernels use, run by itself.

Each row of csrc/wrappers runs one instruction on given operands. Here stands what must come out of it after
NVIDIA's manuals (*PTX ISA*; *CUDA C++ Programming Guide*), computed in torch without a look at csrc or the
emulator. So on a GPU the table shows whether the wrappers, and with them the emulator's reading of the
manuals, are what the hardware does; through the emulator it shows that reading.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import extension
from .dropout import philox_uint32

_LANES = 32
_WORD = 0xFFFFFFFF
_ONE_ULP = 2.0**-23  # relative, of float32 at its coarsest


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch: the words of each thread, and what must come out.

    input: int64 [threads, input_words], 32-bit words. expected: int64 words [threads, output_words], or
    float64 values of words that are float32, of which ``allowed`` [threads, output_words] is the largest
    error.
    """

    input: Tensor
    expected: Tensor
    allowed: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A row: the function of csrc or of CUDA, the PTX that it is (empty: a whole function), its launches."""

    name: str
    mnemonic: str
    cases: Callable[[], list[Case]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a row; ``detail`` says what is wrong, and is empty where nothing is."""

    name: str
    mnemonic: str
    detail: str

    @property
    def passed(self) -> bool:
        return not self.detail


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random_words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2**32, shape, generator=_generator(seed))


def _bits(values: Tensor) -> Tensor:
    """The words of float32 values."""
    return values.to(torch.float32).view(torch.int32).to(torch.int64) & _WORD


def _floats(words: Tensor) -> Tensor:
    return _as_int32(words).view(torch.float32)


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _rows(words: Tensor) -> Tensor:
    """[32, 1] words of one launch."""
    return words.reshape(_LANES, 1)


# --- arithmetic

_SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 65504.0, 65519.9)


def _samples(low: float, high: float, launches: int = 8) -> Tensor:
    """[launches, 32] float32 values, the special ones and random ones between two bounds."""
    values = torch.rand(launches, _LANES, generator=_generator(1), dtype=torch.float64) * (high - low) + low
    values[0, : len(_SPECIAL)] = torch.tensor(_SPECIAL)
    return values.to(torch.float32)


def _flushed(values: Tensor) -> Tensor:
    """float64 values with what is subnormal in float32 taken for zero."""
    return torch.where(values.abs() < 2.0**-126, values * 0.0, values)


def _approximate(
    function: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    relative: float,
    absolute: float = 0.0,
    *,
    ftz: bool = False,
) -> Callable[[], list[Case]]:
    """A function of one float32, with the manual's bound for its error (and one rounding)."""

    def cases() -> list[Case]:
        found = []
        for values in _samples(low, high):
            operand = _flushed(values.double()) if ftz else values.double()
            exact = function(operand)
            if ftz:
                exact = _flushed(exact)
            allowed = exact.abs() * relative + absolute
            found.append(Case(_rows(_bits(values)), _rows(exact), _rows(allowed.nan_to_num(0.0, 0.0, 0.0))))
        return found

    return cases


def _all_halves() -> list[Case]:
    """Every binary16."""
    halves = torch.arange(2**16).view(-1, _LANES)
    values = halves.to(torch.int32).to(torch.int16).view(torch.float16).double()
    return [
        Case(_rows(row), _rows(value), torch.zeros(_LANES, 1))
        for row, value in zip(halves, values, strict=True)
    ]


def _pairs(dtype: torch.dtype) -> Callable[[], list[Case]]:
    """Two float32 (upper, lower half) rounded to nearest even."""

    def rounded(values: Tensor) -> Tensor:
        words = values.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF
        return torch.where(values.isnan(), 0x7FFF, words)

    def cases() -> list[Case]:
        found = []
        for seed in range(8):
            words = _random_words(_LANES, 2, seed=seed)
            if seed < 4:  # exponents near those of binary16, and ties
                words = _bits((_samples(-70000.0, 70000.0)[seed] * 2.0 ** (-6 * seed)).repeat(2, 1).T)
                words[:, 1] &= 0xFFFFF000
            high, low = rounded(_floats(words)).unbind(1)
            found.append(Case(words, _rows(high << 16 | low)))
        return found

    return cases


def _to_tf32() -> list[Case]:
    found = []
    for seed in range(4):
        words = _random_words(_LANES, seed=seed)
        words[:4] = torch.tensor([0x3F801000, 0xBF801000, 0x3F800FFF, 0x00001000])  # ties go away from zero
        words[4:6] = torch.tensor([0x7F800000, 0x7FC00000])
        rounded = torch.where(_floats(words).isfinite(), words + 0x1000, words) & ~0x1FFF
        found.append(Case(_rows(words), _rows(rounded)))
    return found


def _philox() -> list[Case]:
    words = _random_words(_LANES, 4)
    seed, counter = (words[:, i + 1] << 32 | words[:, i] for i in (0, 2))
    return [Case(words, philox_uint32(seed, counter))]


# --- exchanges between lanes


def _shuffle(source: Callable[[Tensor, int], Tensor]) -> Callable[[], list[Case]]:
    """source(lanes, distance): the lane whose value is taken; one that is not there means the lane itself."""

    def cases() -> list[Case]:
        found = []
        lanes = torch.arange(_LANES)
        for distance in (0, 1, 5, 16, 31):
            values = _random_words(_LANES, seed=distance)
            taken = source(lanes, distance)
            taken = torch.where((taken >= 0) & (taken < _LANES), taken, lanes)
            words = torch.stack((values, torch.full((_LANES,), distance)), 1)
            found.append(Case(words, _rows(values[taken])))
        return found

    return cases


def _of_all(function: Callable[[list[int]], int]) -> Callable[[], list[Case]]:
    """Every lane gets the same word, a function of the words of all."""

    def cases() -> list[Case]:
        zeros, ones = torch.zeros(_LANES, dtype=torch.int64), torch.ones(_LANES, dtype=torch.int64)
        some = torch.arange(_LANES) % 3
        return [
            Case(_rows(words), torch.full((_LANES, 1), function(words.tolist()) & _WORD))
            for words in (zeros, ones, some, _random_words(_LANES), _random_words(_LANES) | 0x10001)
        ]

    return cases


def _as_signed(words: list[int]) -> list[int]:
    return [word - 2**32 if word >= 2**31 else word for word in words]


def _fold(function: Callable[[int, int], int]) -> Callable[[list[int]], int]:
    def folded(words: list[int]) -> int:
        result = words[0]
        for word in words[1:]:
            result = function(result, word)
        return result

    return folded


def _barrier() -> list[Case]:
    words = _random_words(128, 1)
    return [Case(words, words[torch.arange(128) ^ 32])]


# --- memory


def _copies() -> list[Case]:
    """The first bytes are copied, the others become zero; twice, for two groups."""
    found = []
    for seed in range(2):
        words = _random_words(_LANES, 8, seed=seed)
        words[:, 4] = torch.randint(17, (_LANES,), generator=_generator(seed)) if seed else 16
        data = _as_int32(words[:, :4]).view(torch.uint8).clone()
        data[torch.arange(16) >= words[:, 4:5]] = 0
        copied = data.view(torch.int32).to(torch.int64) & _WORD
        found.append(Case(words, copied.repeat(1, 2)))
    return found


_GROUP, _MEMBER = torch.arange(_LANES) // 4, torch.arange(_LANES) % 4


def _matrix_fragments(matrices: Tensor, transposed: bool) -> Tensor:
    """[32, m] words of [m, 8, 8] 16-bit elements."""
    if transposed:
        matrices = matrices.transpose(1, 2)
    lower, upper = matrices[:, _GROUP, 2 * _MEMBER], matrices[:, _GROUP, 2 * _MEMBER + 1]
    return (upper << 16 | lower).T


def _packed(elements: Tensor) -> Tensor:
    """[rows, 4] words of [rows, 8] 16-bit elements."""
    return elements[:, 1::2] << 16 | elements[:, 0::2]


def _load_matrix(count: int, transposed: bool = False) -> Callable[[], list[Case]]:
    def cases() -> list[Case]:
        found = []
        for seed in range(4):
            elements = torch.randint(2**16, (_LANES, 8), generator=_generator(seed))
            rows = torch.randint(_LANES, (_LANES,), generator=_generator(seed + 9))
            matrices = elements[rows[: 8 * count]].view(count, 8, 8)
            words = torch.cat((_packed(elements), rows[:, None]), 1)
            found.append(Case(words, _matrix_fragments(matrices, transposed)))
        return found

    return cases


def _store_matrix(transposed: bool = False) -> Callable[[], list[Case]]:
    def cases() -> list[Case]:
        found = []
        for seed in range(4):
            elements = torch.randint(2**16, (_LANES, 8), generator=_generator(seed))
            rows = torch.randperm(_LANES, generator=_generator(seed + 9))
            words = _matrix_fragments(elements[rows].view(4, 8, 8), transposed)
            found.append(Case(torch.cat((words, rows[:, None]), 1), _packed(elements)))
        return found

    return cases


# --- mma.sync


def _elements(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The bits of values in float16, bfloat16 or (None) tf32, which all of them have exactly."""
    if dtype is None:
        return _bits(values)
    return values.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF


def _a_fragments(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[32, 4] words of A [16, K]."""
    bits = _elements(a, dtype)
    rows = [_GROUP + 8 * (i % 2) for i in range(4)]
    if dtype is None:
        return torch.stack([bits[rows[i], _MEMBER + 4 * (i // 2)] for i in range(4)], 1)
    columns = [2 * _MEMBER + 8 * (i // 2) for i in range(4)]
    return torch.stack([bits[rows[i], columns[i] + 1] << 16 | bits[rows[i], columns[i]] for i in range(4)], 1)


def _b_fragments(b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[32, 2] words of B [K, 8]."""
    bits = _elements(b, dtype)
    if dtype is None:
        return torch.stack([bits[_MEMBER + 4 * i, _GROUP] for i in range(2)], 1)
    rows = [2 * _MEMBER + 8 * i for i in range(2)]
    return torch.stack([bits[rows[i] + 1, _GROUP] << 16 | bits[rows[i], _GROUP] for i in range(2)], 1)


def _accumulators(d: Tensor) -> Tensor:
    """[32, 4] elements of D [16, 8]."""
    return torch.stack([d[_GROUP + 8 * (e // 2), 2 * _MEMBER + e % 2] for e in range(4)], 1)


def _rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return _floats(_bits(values) & ~0x1FFF).double()
    return values.to(dtype).double()


def _products(dtype: torch.dtype | None) -> Callable[[], list[Case]]:
    """D + A B, of float16, bfloat16 or (None) tf32."""
    depth = 8 if dtype is None else 16

    def case(a: Tensor, b: Tensor, d: Tensor, exact: bool) -> Case:
        words = torch.cat((_a_fragments(a, dtype), _b_fragments(b, dtype), _bits(_accumulators(d))), 1)
        expected = _accumulators(d + a @ b)
        if exact:
            return Case(words, expected, torch.zeros_like(expected))
        # Each of K + 1 terms and each of at most two partial sums may lose an ulp of the largest term.
        terms = _accumulators(d.abs() + a.abs() @ b.abs())
        return Case(words, expected, terms * (depth + 3) * _ONE_ULP)

    def cases() -> list[Case]:
        found = []
        for seed in range(6):
            random = _generator(seed)

            def normal(*shape: int, random: torch.Generator = random) -> Tensor:
                return torch.randn(shape, generator=random, dtype=torch.float64)

            if seed < 3:  # whole numbers: no sum is rounded
                a, b = (normal(16, depth) * 8).round(), (normal(depth, 8) * 8).round()
                found.append(case(a, b, (normal(16, 8) * 64).round(), exact=True))
            else:
                a, b = _rounded(normal(16, depth), dtype), _rounded(normal(depth, 8), dtype)
                found.append(case(a, b, _floats(_bits(normal(16, 8))).double(), exact=False))
        a, b, d = torch.ones(16, depth).double(), torch.ones(depth, 8).double(), torch.zeros(16, 8).double()
        a[3, 2], a[9, 1], b[4, 5], d[0, 0] = math.inf, -math.inf, math.nan, math.inf
        found.append(case(a, b, d, exact=True))
        return found

    return cases


INSTRUCTIONS = (
    Instruction("cvt_f32_f16", "cvt.f32.f16", _all_halves),
    Instruction("cvt_rn_f16x2_f32", "cvt.rn.f16x2.f32", _pairs(torch.float16)),
    Instruction("cvt_rn_bf16x2_f32", "cvt.rn.bf16x2.f32", _pairs(torch.bfloat16)),
    Instruction("cvt_rna_tf32_f32", "cvt.rna.tf32.f32", _to_tf32),
    Instruction(
        "ex2_approx_ftz_f32", "ex2.approx.ftz.f32", _approximate(torch.exp2, -130, 20, 2.0**-22, ftz=True)
    ),
    Instruction(
        "lg2_approx_ftz_f32",
        "lg2.approx.ftz.f32",
        _approximate(torch.log2, 0, 4, 2.0**-22, 2.0**-22, ftz=True),
    ),
    Instruction(
        "rcp_approx_ftz_f32", "rcp.approx.ftz.f32", _approximate(torch.reciprocal, -9, 9, _ONE_ULP, ftz=True)
    ),
    Instruction("tanh_approx_f32", "tanh.approx.f32", _approximate(torch.tanh, -4, 4, 2.0**-10.987)),
    Instruction("rsqrtf", "rsqrt.approx.f32", _approximate(torch.rsqrt, 0, 9, 2 * _ONE_ULP)),
    Instruction("erff", "", _approximate(torch.erf, -4, 4, 2 * _ONE_ULP, 2.0**-148)),
    Instruction("tanhf", "", _approximate(torch.tanh, -4, 4, 2 * _ONE_ULP, 2.0**-148)),
    Instruction("philox_4x32_7", "", _philox),
    Instruction("__shfl_sync", "shfl.sync.idx.b32", _shuffle(lambda lanes, lane: lanes * 0 + lane)),
    Instruction("__shfl_xor_sync", "shfl.sync.bfly.b32", _shuffle(lambda lanes, mask: lanes ^ mask)),
    Instruction("__shfl_up_sync", "shfl.sync.up.b32", _shuffle(lambda lanes, delta: lanes - delta)),
    Instruction("__shfl_down_sync", "shfl.sync.down.b32", _shuffle(lambda lanes, delta: lanes + delta)),
    Instruction(
        "__ballot_sync",
        "vote.sync.ballot.b32",
        _of_all(lambda words: sum((word != 0) << lane for lane, word in enumerate(words))),
    ),
    Instruction("__any_sync", "vote.sync.any.pred", _of_all(lambda words: int(any(words)))),
    Instruction("__all_sync", "vote.sync.all.pred", _of_all(lambda words: int(all(words)))),
    Instruction("__reduce_add_sync", "redux.sync.add.u32", _of_all(sum)),
    Instruction("__reduce_min_sync", "redux.sync.min.s32", _of_all(lambda words: min(_as_signed(words)))),
    Instruction("__reduce_max_sync", "redux.sync.max.s32", _of_all(lambda words: max(_as_signed(words)))),
    Instruction("__reduce_and_sync", "redux.sync.and.b32", _of_all(_fold(lambda a, b: a & b))),
    Instruction("__reduce_or_sync", "redux.sync.or.b32", _of_all(_fold(lambda a, b: a | b))),
    Instruction("__reduce_xor_sync", "redux.sync.xor.b32", _of_all(_fold(lambda a, b: a ^ b))),
    Instruction("bar_sync", "bar.sync", _barrier),
    Instruction("cp_async_ca_4", "cp.async.ca.shared.global", _copies),
    Instruction("cp_async_ca_8", "cp.async.ca.shared.global", _copies),
    Instruction("cp_async_cg_16", "cp.async.cg.shared.global", _copies),
    Instruction("ldmatrix_x1", "ldmatrix.sync.aligned.m8n8.x1.shared.b16", _load_matrix(1)),
    Instruction("ldmatrix_x2", "ldmatrix.sync.aligned.m8n8.x2.shared.b16", _load_matrix(2)),
    Instruction("ldmatrix_x4", "ldmatrix.sync.aligned.m8n8.x4.shared.b16", _load_matrix(4)),
    Instruction("ldmatrix_x1_trans", "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16", _load_matrix(1, True)),
    Instruction("ldmatrix_x2_trans", "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", _load_matrix(2, True)),
    Instruction("ldmatrix_x4_trans", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", _load_matrix(4, True)),
    Instruction("stmatrix_x4", "stmatrix.sync.aligned.m8n8.x4.shared.b16", _store_matrix()),
    Instruction("stmatrix_x4_trans", "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", _store_matrix(True)),
    Instruction("stmatrix_x4_by_shuffles", "shfl.sync.idx.b32", _store_matrix()),
    Instruction("stmatrix_x4_trans_by_shuffles", "shfl.sync.idx.b32", _store_matrix(True)),
    Instruction(
        "mma_m16n8k16_f16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", _products(torch.float16)
    ),
    Instruction(
        "mma_m16n8k16_bf16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", _products(torch.bfloat16)
    ),
    Instruction("mma_m16n8k8_tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", _products(None)),
)


def _difference(case: Case, output: Tensor) -> str:
    """Where the output, int64 words, is first not what it must be; empty where it is."""
    if case.allowed is None:
        wrong = output != case.expected
    else:
        values = _floats(output).double()
        both_nan = values.isnan() & case.expected.isnan()
        close = (values - case.expected).abs() <= case.allowed
        wrong = ~(both_nan | (values == case.expected) | close)
    if not wrong.any():
        return ""
    thread, word = (int(index) for index in wrong.nonzero()[0])
    got, due = int(output[thread, word]), case.expected[thread, word].item()
    if case.allowed is None:
        said = f"expected 0x{due:08x}, got 0x{got:08x}"
    else:
        said = f"expected {due:.9g}, got {float(_floats(output)[thread, word]):.9g}"
    operands = " ".join(f"{operand:08x}" for operand in case.input[thread].tolist())
    count = f"{int(wrong.sum())} of {wrong.numel()} words differ"
    return f"{count}; thread {thread}, word {word}: {said} of {operands}"


def _run(instruction: Instruction, case: Case, device: torch.device) -> str:
    module = extension.load()
    words = _as_int32(case.input).to(device).contiguous()
    output = torch.full(case.expected.shape, -1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    try:
        module.run_wrapper(
            instruction.name, words.data_ptr(), output.data_ptr(), max(words.get_device(), 0), stream
        )
        return _difference(case, output.cpu().to(torch.int64) & _WORD)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def check(device: torch.device) -> list[Outcome]:
    """Runs every instruction on ``device``, a GPU or, through the emulator, the CPU.

    Raises RuntimeError where the compiled module is missing or can't run there.
    """
    obstacle = extension.device_obstacle(device)
    if obstacle is not None:
        raise RuntimeError(obstacle)
    outcomes = []
    for instruction in INSTRUCTIONS:
        details = (_run(instruction, case, device) for case in instruction.cases())
        detail = next((text for text in details if text), "")
        outcomes.append(Outcome(instruction.name, instruction.mnemonic, detail))
    return outcomes


def as_json(outcomes: list[Outcome], device: torch.device) -> str:
    rows = [{**dataclasses.asdict(outcome), "passed": outcome.passed} for outcome in outcomes]
    return json.dumps({"device": _device_name(device), "instructions": rows}, indent=2)


def as_text(outcomes: list[Outcome], device: torch.device) -> str:
    """The table for a person; its last line is the verdict."""
    widths = [max(len(getattr(o, field)) for o in outcomes) for field in ("name", "mnemonic")]
    lines = [f"Instructions of the CUDA C++ kernels, {_device_name(device)}"]
    for outcome in outcomes:
        verdict = "ok" if outcome.passed else f"WRONG: {outcome.detail}"
        lines.append(f"  {outcome.name:{widths[0]}}  {outcome.mnemonic:{widths[1]}}  {verdict}")
    if device.type == "cpu":
        lines += [
            "",
            "This shows how the emulator reads NVIDIA's manuals. The table has not been run on a GPU yet.",
        ]
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    passed = f"All {len(outcomes)} instructions give what the manuals say."
    return "\n".join([*lines, "", f"WRONG: {', '.join(failed)}" if failed else passed])


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "on the CPU, through the emulator"
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    return f"on {torch.cuda.get_device_name(device)}, sm_{capability}"
