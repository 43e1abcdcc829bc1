"""linear_activation and feed_forward on every backend against float64: the output and every gradient."""

from __future__ import annotations

import random

import pytest
import torch

import llmkernels
from llmkernels import testing
from llmkernels.ops.feed_forward.call import ACTIVATIONS

from .feed_forward_cases import Case, check

OPS = ("linear_activation", "feed_forward")
HALF = (torch.float16, torch.bfloat16)
# Where torch's own operators behave otherwise.
own_backends = pytest.mark.parametrize("backend", ("reference", "triton", "cuda"), indirect=True)


def random_case(seed: int) -> Case:
    """Any combination of what the ops take, at small sizes."""
    draw = random.Random(seed)
    op = draw.choice(("linear_activation", "feed_forward", "feed_forward"))
    leading = tuple(draw.randint(1, 12) for _ in range(draw.randint(0, 3)))
    return Case(
        op=op,
        shape=(*leading, draw.choice((1, 3, 8, 31, 64, 100))),
        hidden=draw.choice((1, 2, 7, 16, 33, 130, 136)),
        out=draw.choice((1, 5, 16, 65)),
        activation=draw.choice(tuple(ACTIVATIONS)),
        dtype=draw.choice((torch.float32, *HALF)),
        bias1=draw.random() < 0.7,
        bias2=draw.random() < 0.7,
        dropout_p=draw.choice((0.0, 0.0, 0.1, 0.5)) if op == "feed_forward" else 0.0,
        recompute=draw.random() < 0.3,
        layout=draw.choice(tuple(testing.LAYOUTS)),
        weight_layout=draw.choice(tuple(testing.LAYOUTS)),
        gradient_layout=draw.choice(tuple(testing.LAYOUTS)),
        scale=draw.choice((1.0, 0.1, 4.0)),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(30))
def test_random_calls(backend: str, device: torch.device, seed: int) -> None:
    check(random_case(seed), backend, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "op, dtype", (("linear_activation", torch.float32), ("feed_forward", torch.bfloat16))
)
def test_activations(
    backend: str, device: torch.device, op: str, activation: str, dtype: torch.dtype
) -> None:
    check(Case(op, (2, 35, 72), 136, 48, activation, dtype, seed=1), backend, device)


@pytest.mark.parametrize(
    "rows, d, hidden, out, activation",
    (
        (1, 1, 1, 1, "swiglu"),
        (1, 200, 40, 200, "gelu"),
        (200, 1, 1, 200, "gelu"),
        (64, 64, 64, 64, "swiglu"),
        (65, 65, 65, 65, "gelu"),
        (128, 128, 128, 128, "gelu"),
        (129, 129, 129, 129, "swiglu"),
        (1100, 16, 24, 8, "gelu"),
    ),
)
def test_sizes(
    backend: str, device: torch.device, rows: int, d: int, hidden: int, out: int, activation: str
) -> None:
    """At, below and above the tiles' edges; more row tiles than the grouped order takes at a time."""
    check(Case(shape=(rows, d), hidden=hidden, out=out, activation=activation, seed=2), backend, device)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_weight_layouts(backend: str, device: torch.device, layout: str) -> None:
    """As torch.nn.Linear keeps them, GPT-2's Conv1D ("transposed"), slices, odd addresses."""
    check(Case(weight_layout=layout, dropout_p=0.2, seed=3), backend, device)


def test_weights_without_a_unit_stride(backend: str, device: torch.device) -> None:
    x = testing.random_tensor((6, 8), torch.float32, device, 0)
    weight = testing.random_tensor((20, 16), torch.float32, device, 1)[::2, ::2]
    strided = llmkernels.linear_activation(x, weight, backend=backend)
    dense = llmkernels.linear_activation(x, weight.contiguous(), backend=backend)
    torch.testing.assert_close(strided, dense)


# What the activations do to single values: one feature of weight 1, so that the pre-activation is the input.


def _of_values(values: torch.Tensor, activation: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = values.unsqueeze(1).detach().requires_grad_()
    y = llmkernels.linear_activation(x, torch.ones_like(x[:1]), None, activation, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach().squeeze(1), dx.squeeze(1)


def _exactly(values: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _of_values(values.cpu().double(), activation, "torch")


@pytest.mark.parametrize("activation", ("relu", "gelu", "gelu_tanh"))
def test_activation_values(backend: str, device: torch.device, activation: str) -> None:
    """The bulk, the tails past |x| = 6 where erf is 1 to the last bit, and values whose powers overflow, each
    range on its own scale."""
    ranges = torch.stack([torch.linspace(-largest, largest, 51) for largest in (1.0, 4.0, 12.0, 100.0, 1e4)])
    values = ranges.flatten().to(device)
    found, exact = _of_values(values, activation, backend), _exactly(values, activation)
    baseline = _of_values(values.cpu(), activation, "torch")
    for name, *results in zip(("value", "slope"), found, exact, baseline, strict=True):
        actual, expected, own = (result.view(ranges.shape) for result in results)
        testing.assert_within_budget(actual, expected, own, name=f"{activation} {name}")


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh"))
def test_far_tails_are_exact(backend: str, device: torch.device, activation: str) -> None:
    values = torch.tensor([-1e30, -50.0, -15.0, 0.0, 15.0, 50.0, 1e30], device=device)
    if backend == "torch" and activation == "gelu_tanh":
        values = values[1:-1]  # the cube of 1e30 is no float32, and torch's slope NaN
    value, slope = _of_values(values, activation, backend)
    assert torch.equal(value, values.clamp(min=0))
    assert torch.equal(slope, torch.where(values == 0, 0.5, (values > 0).float()))


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize("activation", ("relu", "gelu", "gelu_tanh"))
@own_backends
def test_limits_at_infinity(backend: str, device: torch.device, activation: str, dtype: torch.dtype) -> None:
    """0 and 1 times x, where torch's GELUs are NaN; NaN itself stays."""
    values = torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=dtype, device=device)
    value, slope = _of_values(values, activation, backend)
    assert value[:2].tolist() == [0.0, torch.inf] and slope[:2].tolist() == [0.0, 1.0]
    assert value[2].isnan() and (activation == "relu" or slope[2].isnan())


@pytest.mark.parametrize("activation", ("swiglu", "geglu"))
@own_backends
def test_gated_limits_at_infinity(backend: str, device: torch.device, activation: str) -> None:
    """A gate that overflows fp16 to -inf closes: 0, not NaN."""
    x = torch.tensor([[-60000.0], [60000.0]], dtype=torch.float16, device=device)
    weight = torch.tensor([[2.0], [0.0]], dtype=torch.float16, device=device)
    bias = torch.tensor([0.0, 3.0], dtype=torch.float16, device=device)
    y = llmkernels.linear_activation(x, weight, bias, activation, backend=backend)
    assert y.squeeze(1).tolist() == [0.0, torch.inf]


def test_exact_and_tanh_gelu_are_never_confused(backend: str, device: torch.device) -> None:
    """FA#129, sglang#33536: the two differ by at most 5e-4, which the budget in float32 tells apart."""
    values = torch.linspace(-4, 4, 101, device=device)
    for activation, other in (("gelu", "gelu_tanh"), ("gelu_tanh", "gelu")):
        found, wrong = _of_values(values, activation, backend), _exactly(values, other)
        baseline = _of_values(values.cpu(), other, "torch")
        for actual, expected, own in zip(found, wrong, baseline, strict=True):
            assert not testing.measure(actual, expected, own).passed


def test_relu_of_an_infinite_gradient(backend: str, device: torch.device) -> None:
    """Where relu is off nothing passes: not inf * 0."""
    x = torch.tensor([[-1.0], [2.0]], device=device, requires_grad=True)
    y = llmkernels.linear_activation(x, torch.ones(1, 1, device=device), None, "relu", backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, torch.inf))
    assert dx.squeeze(1).tolist() == [0.0, torch.inf]


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
def test_nonfinite_stays_in_its_row(
    backend: str, device: torch.device, activation: str, value: float
) -> None:
    case = Case(shape=(5, 24), activation=activation)
    tensors = case.inputs(device)
    with torch.no_grad():
        tensors["input"][2, 7] = value
    y = case.call(tensors, backend)
    (dx,) = torch.autograd.grad(y.sum(), tensors["input"])
    assert not y[2].isfinite().all()
    for result in (y, dx):
        assert result[[0, 1, 3, 4]].isfinite().all()


def test_infinite_weight_column_stays_in_its_column(backend: str, device: torch.device) -> None:
    """Rows that only fill up a tile add nothing to the bias gradient, not even 0 * inf."""
    case = Case(shape=(3, 8), hidden=6, out=4)
    tensors = {name: tensor.detach().abs() for name, tensor in case.inputs(device).items()}
    tensors["weight2"][1, 2] = torch.inf
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    y = case.call(tensors, backend)
    (dbias1,) = torch.autograd.grad(y, tensors["bias1"], torch.ones_like(y))
    assert dbias1.isinf().tolist() == [False, False, True, False, False, False]
    assert not dbias1.isnan().any()


# Shapes and layouts of whole calls


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", ("relu", "geglu"))
@pytest.mark.parametrize("recompute", (False, True))
def test_empty_batch(backend: str, device: torch.device, op: str, activation: str, recompute: bool) -> None:
    """No rows, yet parameter gradients of zeros."""
    case = Case(op, (0, 3, 16), activation=activation, recompute=recompute)
    tensors = case.inputs(device)
    with testing.poisoned():
        y = case.call(tensors, backend)
        gradients = torch.autograd.grad(y.sum(), list(tensors.values()))
    assert y.shape == (0, 3, case.hidden if op == "linear_activation" else case.out)
    for tensor, gradient in zip(tensors.values(), gradients, strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize("d, hidden", ((0, 5), (4, 0)))
def test_empty_features(backend: str, device: torch.device, d: int, hidden: int) -> None:
    """A product of no terms is 0: what is left is the bias."""
    case = Case(shape=(3, d), hidden=hidden, out=2)
    tensors = case.inputs(device)
    with testing.poisoned():
        y = case.call(tensors, backend)
        gradients = torch.autograd.grad(y.sum(), list(tensors.values()))
    torch.testing.assert_close(y, case.torch_call(tensors, None)[0])
    assert all(
        g.isfinite().all() and g.shape == t.shape for g, t in zip(gradients, tensors.values(), strict=True)
    )


def test_one_row_without_a_batch(backend: str, device: torch.device) -> None:
    check(Case(shape=(33,), out=40, dropout_p=0.3), backend, device)


def test_expanded_input_and_gradient(backend: str, device: torch.device) -> None:
    """y.sum().backward() hands over a gradient of strides 0."""
    row = testing.random_tensor((1, 24), torch.float32, device, 0, requires_grad=True)
    tensors = {**Case().inputs(device), "input": row.expand(7, 24)}
    dense = {**tensors, "input": row.expand(7, 24).contiguous()}
    results = [
        torch.autograd.grad(Case().call(t, backend).sum(), [row, t["weight1"]]) for t in (tensors, dense)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("stride, rows", ((2**30 + 8, 3), (2**31 + 8, 2)))
@pytest.mark.parametrize("strided", ("input", "weight1", "weight2"))
def test_offsets_past_2_to_the_31(
    kernel_backend: str, device: torch.device, strided: str, stride: int, rows: int
) -> None:
    """The last row starts more than 2^31 elements in; the memory between the rows is never touched."""
    memory = torch.empty((rows - 1) * stride + 16, dtype=torch.bfloat16, device=device)
    sizes = {"input": (rows, 16), "weight1": (16, 16), "weight2": (16, 16)} | {strided: (rows, 16)}
    tensors = {
        n: testing.random_tensor(s, torch.bfloat16, device, i) for i, (n, s) in enumerate(sizes.items())
    }
    far = memory.as_strided((rows, 16), (stride, 1))
    far.copy_(tensors[strided])
    if strided == "weight1":
        tensors["weight2"] = tensors["weight2"][:, :rows]
    results = []
    for tensor in (far, tensors[strided]):
        leaves = {**tensors, strided: tensor}
        leaves = {name: leaf.detach().requires_grad_(name == "input") for name, leaf in leaves.items()}
        y = llmkernels.feed_forward(
            leaves["input"], leaves["weight1"], None, leaves["weight2"], None, backend=kernel_backend
        )
        results.append((y, *torch.autograd.grad(y.sum(), leaves["input"])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="20 GB of GPU memory")
def test_more_than_2_to_the_31_elements(kernel_backend: str, device: torch.device) -> None:
    m, d, hidden = 2**19 + 3, 64, 2**12
    x, weight = (torch.empty(s, dtype=torch.bfloat16, device=device).normal_() for s in ((m, d), (hidden, d)))
    y = llmkernels.linear_activation(x, weight, backend=kernel_backend)
    for row in (0, 2**19 - 1, 2**19, m - 1):
        one = llmkernels.linear_activation(x[row : row + 1], weight, backend=kernel_backend)
        torch.testing.assert_close(y[row : row + 1], one)


# What is computed and kept


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recompute_is_bitwise_the_same(backend: str, device: torch.device, activation: str) -> None:
    runs = []
    for recompute in (False, True):
        case = Case(
            shape=(70, 40),
            hidden=72,
            activation=activation,
            dtype=torch.bfloat16,
            dropout_p=0.3,
            recompute=recompute,
        )
        tensors = case.inputs(device)
        torch.manual_seed(5)
        y = case.call(tensors, backend)
        runs.append((y, *torch.autograd.grad(y, list(tensors.values()), case.output_gradient(y))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_bitwise_reproducible(backend: str, device: torch.device, op: str) -> None:
    case = Case(op, (140, 24), 72, dtype=torch.bfloat16, dropout_p=0.2 if op == "feed_forward" else 0.0)
    tensors = case.inputs(device)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        y = case.call(tensors, backend)
        runs.append((y, *torch.autograd.grad(y, list(tensors.values()), case.output_gradient(y))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    "op, activation, recompute",
    (
        ("linear_activation", "gelu", False),
        ("feed_forward", "swiglu", False),
        ("feed_forward", "gelu", True),
    ),
)
def test_only_wanted_gradients(
    backend: str, device: torch.device, op: str, activation: str, recompute: bool
) -> None:
    """Frozen tensors get none, and the others get what they get when all are wanted."""
    case = Case(op, (9, 24), activation=activation, dropout_p=0.3 if op == "feed_forward" else 0.0)
    tensors = case.inputs(device)
    torch.manual_seed(0)
    y = case.call(tensors, backend)
    dy = case.output_gradient(y)
    everything = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))
    object.__setattr__(case, "recompute", recompute)
    for wanted in tensors:
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == wanted)
        torch.manual_seed(0)
        y = case.call(tensors, backend)
        (only,) = torch.autograd.grad(y, tensors[wanted], dy)
        assert torch.equal(only, everything[wanted]), wanted


def _saved(case: Case, tensors: dict[str, torch.Tensor], backend: str) -> int:
    """Bytes that a forward keeps for backward beside its parameters, each storage once."""
    found: dict[int, int] = {}
    parameters = {t.untyped_storage().data_ptr() for name, t in tensors.items() if name != "input"}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = case.call(tensors, backend)
    del y
    return sum(found.values())


@pytest.mark.parametrize(
    "activation, recompute, saving",
    (("gelu", False, 0.44), ("gelu_tanh", False, 0.44), ("gelu", True, 0.88), ("swiglu", False, 0.45)),
)
@own_backends
def test_saved_bytes(
    backend: str, device: torch.device, activation: str, recompute: bool, saving: float
) -> None:
    """Against torch's eager path, whose hidden size is 4 d, gated 8/3 d: of 9 d resp. 35/3 d kept x and pre,
    with recompute x alone."""
    hidden = 64 if activation == "swiglu" else 96
    case = Case(shape=(4, 32, 24), hidden=hidden, activation=activation, recompute=recompute)
    tensors = case.inputs(device)
    ours, elements = _saved(case, tensors, backend), 4 * 32
    assert ours == 4 * elements * (24 + (0 if recompute else case.width))
    object.__setattr__(case, "recompute", False)
    assert 1 - ours / _saved(case, tensors, "torch") >= saving


def test_recompute_by_torch_keeps_nothing_of_the_hidden_size(device: torch.device) -> None:
    """Where no kernel serves, recompute is activation checkpointing."""
    case = Case(shape=(32, 24), hidden=96, recompute=True)
    assert _saved(case, case.inputs(device), "torch") <= 4 * 32 * 24


@pytest.mark.parametrize(
    "trained, kept",
    (
        (("bias2",), 0),
        (("bias1",), 80),
        (("input",), 80),
        (("weight2",), 40),
        (("weight2", "bias2"), 40),
        (("weight1",), 80 + 24),
        ((), 0),
    ),
)
@own_backends
def test_frozen_tensors_keep_nothing(
    backend: str, device: torch.device, trained: tuple[str, ...], kept: int
) -> None:
    """Elements a row of what is saved, of an input of 24, a hidden of 40 and a gated pre-activation of 80."""
    case = Case(shape=(7, 24), hidden=40, activation="swiglu")
    tensors = {n: t.detach().requires_grad_(n in trained) for n, t in case.inputs(device).items()}
    assert _saved(case, tensors, backend) == 4 * 7 * kept


# Dropout


@pytest.mark.parametrize("hidden", (1, 7, 64, 137))
def test_dropout_mask_is_the_reference_mask(kernel_backend: str, device: torch.device, hidden: int) -> None:
    """The kernels and the reference drop the same elements, so a backend can be swapped in mid-training."""
    x, weight = torch.ones(20, 3, device=device), torch.ones(hidden, 3, device=device)
    masks = []
    for backend in (kernel_backend, "reference"):
        torch.manual_seed(3)
        identity = torch.eye(hidden, device=device)
        y = llmkernels.feed_forward(x, weight, None, identity, None, dropout_p=0.5, backend=backend)
        masks.append(y != 0)
    assert torch.equal(*masks) and masks[0].any() and not masks[0].all()


def test_dropout_statistics(backend: str, device: torch.device) -> None:
    x, weight = torch.ones(64, 1, device=device), torch.ones(200, 1, device=device)
    torch.manual_seed(0)
    identity = torch.eye(200, device=device)
    y = llmkernels.feed_forward(x, weight, None, identity, None, "relu", 0.25, backend=backend)
    kept = (y != 0).double()
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.75))
    # Five standard deviations of a binomial, for all elements and for neighbours in either direction.
    assert abs(kept.mean() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    centred = kept - 0.75
    for neighbours in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(neighbours.mean()) < 5 * 0.75 * 0.25 / neighbours.numel() ** 0.5


def test_dropout_follows_the_generator(backend: str, device: torch.device) -> None:
    tensors = Case().inputs(device)

    def draw() -> torch.Tensor:
        return Case(dropout_p=0.5).call(tensors, backend)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout_p, training", ((0.0, True), (0.7, False), (1.0, True)))
def test_dropout_off_and_full(backend: str, device: torch.device, dropout_p: float, training: bool) -> None:
    case = Case()
    tensors = case.inputs(device)
    plain = case.call(tensors, backend)
    state = torch.get_rng_state()
    options = {"dropout_p": dropout_p, "training": training, "backend": backend}
    y = llmkernels.feed_forward(**tensors, **options)
    (dx,) = torch.autograd.grad(y.sum(), tensors["input"])
    if dropout_p == 1.0:
        assert torch.equal(y, tensors["bias2"].expand(y.shape)) and (dx == 0).all()
    else:
        assert torch.equal(y, plain) and (dx != 0).any()
        assert torch.equal(torch.get_rng_state(), state), "no dropout must draw no random number"
