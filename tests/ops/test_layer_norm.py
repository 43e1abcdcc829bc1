"""layer_norm, add_layer_norm and rms_norm on every backend against float64: outputs and every gradient."""

from __future__ import annotations

import random

import pytest
import torch

import llmkernels
from llmkernels import dropout, testing

from .layer_norm_cases import Case, check

OPS = ("layer_norm", "add_layer_norm", "rms_norm")
HALF = (torch.float16, torch.bfloat16)


def random_case(seed: int) -> Case:
    """Any combination of what the ops take, at small sizes."""
    draw = random.Random(seed)
    dtype = draw.choice((torch.float32, *HALF))
    dims = draw.choice((1, 1, 1, 2))
    leading = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3)))
    trailing = (draw.choice((1, 2, 3, 4, 7, 8, 16, 31, 33, 64, 100, 257, 768)),)
    if dims == 2:
        trailing = (draw.randint(1, 4), *trailing)
    half = dtype in HALF
    return Case(
        op=draw.choice(OPS),
        shape=leading + trailing,
        dims=dims,
        dtype=dtype,
        parameter_dtype=torch.float32 if half and draw.random() < 0.5 else None,
        residual_in=draw.choice((None, torch.float32, dtype)),
        residual_out=draw.choice((None, torch.float32, dtype)),
        weight=draw.random() < 0.8,
        bias=draw.random() < 0.8,
        dropout_p=draw.choice((0.0, 0.0, 0.1, 0.5)),
        eps=draw.choice((1e-5, 1e-12, 1e-2)),
        layout=draw.choice(tuple(testing.LAYOUTS)),
        gradient_layout=draw.choice(tuple(testing.LAYOUTS)),
        shift=draw.choice((0.0, 0.0, 3.0)),
        scale=draw.choice((1.0, 0.01, 30.0)),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(backend: str, device: torch.device, seed: int) -> None:
    check(random_case(seed), backend, device)


@pytest.mark.parametrize(
    "n", (1, 7, 229, 541, 1023, 1024, 1025, 3000, 4096, 8191, 12288, 32768, 65537, 262144)
)
@pytest.mark.parametrize("op", OPS)
def test_widths(backend: str, device: torch.device, op: str, n: int) -> None:
    """From one column to the widest rows: every row of every tile table, the looped paths too."""
    for dtype in (torch.float32, torch.bfloat16) if n < 10000 else (torch.bfloat16,):
        dropout_p = 0.1 if op == "add_layer_norm" else 0.0
        check(Case(op, (3, n), dtype=dtype, dropout_p=dropout_p, seed=n), backend, device)


@pytest.mark.parametrize("rows", (1, 2, 5, 129, 1000))
@pytest.mark.parametrize("op", OPS)
def test_row_counts(backend: str, device: torch.device, op: str, rows: int) -> None:
    """Rows that fill neither the last tile nor the last partial of the parameter gradients."""
    check(Case(op, (rows, 40), dtype=torch.float32, seed=rows), backend, device)


def test_more_rows_than_a_grid_dimension(backend: str, device: torch.device) -> None:
    """apex#411: past 65535 rows a grid's second dimension wraps."""
    check(Case("layer_norm", (65536 + 3, 2), seed=1), backend, device)


# Values that have broken norms elsewhere: (values of a [4, n] float32 tensor, eps).
n = 229
ramp = torch.arange(n, dtype=torch.float64)
ADVERSARIAL = {
    "mean 1e2": (1e2 + 1e-3 * ramp, 1e-5),
    "mean 1e4": (1e4 + 1e-3 * ramp, 1e-5),
    "mean 1e6": (1e6 + 1e-3 * ramp, 1e-5),
    "2000 +- 1": (2000 + torch.cos(ramp), 1e-5),
    "constant": (torch.full((n,), 3.14159), 1e-5),
    "zeros": (torch.zeros(n), 1e-5),
    "zeros, tiny eps": (torch.zeros(n), 1e-12),
    "eps above the variance": (1e-4 * torch.sin(ramp), 1.0),
    "denormals": (1e-40 * torch.sin(ramp), 1e-12),
    "outlier": (torch.where(ramp == 17, 1e4, torch.sin(ramp)), 1e-5),
    "large": (1e15 * torch.sin(ramp), 1e-5),
}


@pytest.mark.parametrize("values", ADVERSARIAL)
@pytest.mark.parametrize("op", OPS)
def test_adversarial_values(backend: str, device: torch.device, op: str, values: str) -> None:
    row, eps = ADVERSARIAL[values]
    case = Case(op, (4, n), eps=eps)
    inputs = case.inputs
    object.__setattr__(case, "inputs", lambda device: _with_rows(inputs(device), row))
    check(case, backend, device)


def _with_rows(tensors: dict[str, torch.Tensor], row: torch.Tensor) -> dict[str, torch.Tensor]:
    x = tensors["input"]
    tensors["input"] = row.to(x).expand(x.shape).clone().requires_grad_()
    if "residual" in tensors:
        tensors["residual"] = torch.zeros_like(tensors["residual"]).requires_grad_()
    return tensors


@pytest.mark.parametrize("columns", (229, 1000, 4096, 40000))
def test_large_mean_keeps_its_digits(kernel_backend: str, device: torch.device, columns: int) -> None:
    """A row near 1e6 loses its deviations to the rounding of its mean in torch, whose error the budget would
    allow; the corrected mean keeps them, so here no error of torch's counts."""
    x = (1e6 + 0.25 * torch.randn(2, columns, generator=torch.Generator().manual_seed(0))).to(device)
    y = llmkernels.layer_norm(x, (columns,), backend=kernel_backend)
    exact = torch.nn.functional.layer_norm(x.cpu().double(), (columns,))
    testing.assert_within_budget(y, exact, exact.float(), name="output")


@pytest.mark.parametrize("value", (1e30, -1e30))
@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_variance_overflow(kernel_backend: str, device: torch.device, op: str, value: float) -> None:
    """The square of 1e30 is no float32: then rstd is 0 and the row comes out as zeros, where torch's CPU
    operator gives NaN (pytorch#178123). A constant row of 1e30 has no variance and is no such case."""
    x = torch.linspace(-1, 1, 64, device=device).mul(value).expand(2, 64).contiguous().requires_grad_()
    y = getattr(llmkernels, op)(x, (64,), backend=kernel_backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all() and (dx == 0).all()
    constant = llmkernels.layer_norm(torch.full_like(x, value), (64,), backend=kernel_backend)
    assert (constant == 0).all()


def test_half_range_limits(backend: str, device: torch.device) -> None:
    """fp16 rows of +-65504 normalise to +-1: their square is far outside fp16."""
    x = torch.full((2, 64), 65504.0, dtype=torch.float16, device=device)
    x[:, ::2] = -65504.0
    y = llmkernels.layer_norm(x, (64,), backend=backend)
    assert torch.equal(y.cpu().float().abs(), torch.ones(2, 64))


def test_zero_rows_without_eps(backend: str, device: torch.device) -> None:
    """0 / 0 is NaN in torch; it is here too, and only in its own row."""
    x = torch.zeros(2, 16, device=device)
    x[1] = torch.arange(16.0)
    y = llmkernels.layer_norm(x, (16,), eps=0.0, backend=backend)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("op", OPS)
def test_nonfinite_stays_in_its_row(backend: str, device: torch.device, op: str, value: float) -> None:
    case = Case(op, (5, 100))
    tensors = case.inputs(device)
    with torch.no_grad():
        tensors["input"][2, 50] = value
    y, *_ = case.call(tensors, backend)
    (dx,) = torch.autograd.grad(y.sum(), tensors["input"])
    for result in (y, dx):
        assert not result[2].isfinite().all()
        assert result[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("value", (0.0, 1e10))
def test_extreme_weights(backend: str, device: torch.device, value: float) -> None:
    """Fast-LLM#220: nothing is ever divided by the weight."""
    case = Case("layer_norm", (3, 50))
    inputs = case.inputs

    def with_weight(device: torch.device) -> dict[str, torch.Tensor]:
        tensors = inputs(device)
        tensors["weight"] = torch.full_like(tensors["weight"], value).requires_grad_()
        return tensors

    object.__setattr__(case, "inputs", with_weight)
    check(case, backend, device)


def test_expanded_gradient(backend: str, device: torch.device) -> None:
    """quack#88: y.sum().backward() hands over a gradient of strides 0."""
    x = testing.random_tensor((6, 33), torch.float32, device, 0, requires_grad=True)
    weight = testing.random_tensor((33,), torch.float32, device, 1, requires_grad=True)
    y = llmkernels.layer_norm(x, (33,), weight, backend=backend)
    strided = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    dense = torch.autograd.grad(y, (x, weight), torch.ones(6, 33, device=device), retain_graph=True)
    rows = torch.autograd.grad(y, (x, weight), torch.ones(33, device=device).expand(6, 33))
    for a, b, c in zip(strided, dense, rows, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_expanded_input(backend: str, device: torch.device) -> None:
    row = testing.random_tensor((1, 33), torch.float32, device, 0)
    y = llmkernels.layer_norm(row.expand(5, 33), (33,), backend=backend)
    assert torch.equal(y, llmkernels.layer_norm(row.expand(5, 33).contiguous(), (33,), backend=backend))


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(backend: str, device: torch.device, op: str) -> None:
    """pytorch#28614: no rows, yet parameter gradients of zeros."""
    case = Case(op, (0, 3, 16))
    tensors = case.inputs(device)
    with testing.poisoned():
        outputs = case.call(tensors, backend)
        gradients = torch.autograd.grad(sum(y.sum() for y in outputs), list(tensors.values()))
    assert all(y.shape == (0, 3, 16) for y in outputs)
    for tensor, gradient in zip(tensors.values(), gradients, strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize("stride, rows", ((2**30 + 8, 3), (2**31 + 8, 2)))
def test_offsets_past_2_to_the_31(backend: str, device: torch.device, stride: int, rows: int) -> None:
    """The last row starts more than 2^31 elements in, by a stride that is an int32 and by one that is not;
    the memory between the rows is never touched."""
    memory = torch.empty((rows - 1) * stride + 64, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((rows, 64), (stride, 1))
    x.copy_(testing.random_tensor((rows, 64), torch.bfloat16, device, 0))
    weight = torch.ones(64, device=device, requires_grad=True)
    found, dense = x.detach().requires_grad_(), x.contiguous().requires_grad_()
    y = llmkernels.layer_norm(found, (64,), weight, backend=backend)
    expected = llmkernels.layer_norm(dense, (64,), weight, backend=backend)
    assert torch.equal(y, expected)
    dy = testing.random_tensor((rows, 64), torch.bfloat16, device, 1)
    (dx,) = torch.autograd.grad(y, found, dy)
    assert torch.equal(dx, torch.autograd.grad(expected, dense, dy)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16 GB of GPU memory")
def test_more_than_2_to_the_31_elements(kernel_backend: str) -> None:
    m, n = 2**20 + 3, 2**11
    x = torch.empty(m, n, dtype=torch.bfloat16, device="cuda").normal_()
    y = llmkernels.layer_norm(x, (n,), backend=kernel_backend)
    for row in (0, 2**20 - 1, 2**20, m - 1):
        one = llmkernels.layer_norm(x[row : row + 1], (n,), backend=kernel_backend)
        assert torch.equal(y[row : row + 1], one)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_bitwise_reproducible(backend: str, device: torch.device, op: str) -> None:
    case = Case(op, (257, 96), dtype=torch.bfloat16, dropout_p=0.2 if op == "add_layer_norm" else 0.0)
    tensors = case.inputs(device)
    runs = []
    for _ in range(3):
        torch.manual_seed(5)
        outputs = case.call(tensors, backend)
        runs.append(
            (*outputs, *torch.autograd.grad(outputs, list(tensors.values()), case.output_gradients(outputs)))
        )
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("wanted", ("input", "residual", "weight", "bias"))
def test_only_wanted_gradients(backend: str, device: torch.device, wanted: str) -> None:
    """Frozen tensors get none, and the others get what they get when all are wanted."""
    case = Case("add_layer_norm", (9, 48), dropout_p=0.3)
    tensors = case.inputs(device)
    torch.manual_seed(0)
    outputs = case.call(tensors, backend)
    gradients = case.output_gradients(outputs)
    everything = dict(
        zip(tensors, torch.autograd.grad(outputs, list(tensors.values()), gradients), strict=True)
    )
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    torch.manual_seed(0)
    outputs = case.call(tensors, backend)
    differentiable = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if y.requires_grad]
    ys, dys = zip(*differentiable, strict=True)
    (only,) = torch.autograd.grad(ys, tensors[wanted], dys)
    assert torch.equal(only, everything[wanted])


@pytest.mark.parametrize("used", (0, 1))
def test_one_output_unused(backend: str, device: torch.device, used: int) -> None:
    """The gradient of an output that nobody used is no gradient, not NaN."""
    case = Case("add_layer_norm", (4, 20))
    tensors = case.inputs(device)
    outputs = case.call(tensors, backend)
    dy = case.output_gradients(outputs)[used]
    found = torch.autograd.grad(outputs[used], [tensors["input"], tensors["residual"]], dy)
    leaves = {name: tensor.detach().cpu().requires_grad_() for name, tensor in tensors.items()}
    own = torch.autograd.grad(
        case.torch_call(leaves, None)[used], [leaves["input"], leaves["residual"]], dy.cpu()
    )
    for a, b in zip(found, own, strict=True):
        testing.assert_within_budget(a, b.double(), b, name=f"gradient through output {used}")


def test_input_as_its_own_residual(backend: str, device: torch.device) -> None:
    x = testing.random_tensor((4, 20), torch.float32, device, 0, requires_grad=True)
    y, z = llmkernels.add_layer_norm(x, x, (20,), backend=backend)
    assert torch.equal(z, 2 * x)
    (dx,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(dx, torch.full_like(x, 2.0))


# Dropout


def test_philox_known_answers() -> None:
    """Philox-4x32-7 of the zero counter and key: the vectors that its authors publish with Random123."""
    words = dropout.philox_uint32(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert [f"{word:08x}" for word in words[0].tolist()] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


@pytest.mark.parametrize("shape", ((3, 1), (5, 7), (4, 64), (2, 1025)))
def test_dropout_mask_is_the_reference_mask(
    kernel_backend: str, device: torch.device, shape: tuple[int, int]
) -> None:
    """Both kernels and the reference drop the same elements, so a backend can be swapped in mid-training."""
    x, residual = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    masks = []
    for backend in (kernel_backend, "reference"):
        torch.manual_seed(3)
        _, z = llmkernels.add_layer_norm(x, residual, shape[1:], dropout_p=0.5, backend=backend)
        masks.append(z != 0)
    assert torch.equal(*masks) and masks[0].any()


def test_dropout_statistics(backend: str, device: torch.device) -> None:
    x, residual = torch.ones(64, 1000, device=device), torch.zeros(64, 1000, device=device)
    torch.manual_seed(0)
    _, z = llmkernels.add_layer_norm(x, residual, (1000,), dropout_p=0.25, backend=backend)
    kept = (z != 0).double()
    assert torch.equal(z[z != 0], torch.full_like(z[z != 0], 1 / 0.75))
    # Five standard deviations of a binomial, for all elements and for neighbours in either direction.
    assert abs(kept.mean() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    centred = kept - 0.75
    for neighbours in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(neighbours.mean()) < 5 * 0.75 * 0.25 / neighbours.numel() ** 0.5


def test_dropout_follows_the_generator(backend: str, device: torch.device) -> None:
    x = torch.ones(8, 100, device=device)

    def draw() -> torch.Tensor:
        return llmkernels.add_layer_norm(x, x, (100,), dropout_p=0.5, backend=backend)[1]

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout_p, training", ((0.0, True), (0.7, False), (1.0, True)))
def test_dropout_off_and_full(backend: str, device: torch.device, dropout_p: float, training: bool) -> None:
    x = testing.random_tensor((3, 10), torch.float32, device, 0, requires_grad=True)
    residual = testing.random_tensor((3, 10), torch.float32, device, 1)
    options = {"dropout_p": dropout_p, "training": training, "backend": backend}
    state = torch.get_rng_state()
    _, z = llmkernels.add_layer_norm(x, residual, (10,), **options)
    (dx,) = torch.autograd.grad(z.sum(), x)
    full = dropout_p == 1.0
    assert torch.equal(z, residual if full else residual + x)
    assert torch.equal(dx, torch.full_like(x, 0.0 if full else 1.0))
    assert full or torch.equal(torch.get_rng_state(), state), "no dropout must draw no random number"
