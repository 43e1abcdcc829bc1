"""The harness end to end on a CPU: what matches is timed, what does not is not, and all of it is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkernels
from bench import __main__ as command
from bench import formulas, measure, record
from bench.case import Case, Function, Tensors, kept_as_often_as_asked
from bench.layer_norm import WORKLOAD, NormVariant
from bench.providers import Provider, Unavailable
from bench.providers.torch_eager import Torch
from bench.workload import INTERPRETED, NO_MATCH, Request, Workload, directions
from llmkernels.triton_support import INTERPRETED as TRITON_IS_INTERPRETED

CPU = torch.device("cpu")
# Small, and with a border of a tile inside.
SHAPES = {"attention": (1, 18), "attention_varlen": (3, 18), "attention_decode": (2, 40)}


class Planted(Provider):
    """Computes a norm as ``spoil`` makes it of torch's."""

    on_cpu = True

    def __init__(self, name: str, spoil: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self._spoil = spoil

    def layer_norm(self, case: Case) -> Function:
        return lambda tensors: self._spoil(formulas.layer_norm(tensors))


def _off_by_a_tenth(y: Tensor) -> Tensor:
    return y + F.one_hot(torch.tensor(3, device=y.device), y.shape[-1]).to(y.dtype) / 10


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy * 1.05


def _raise(y: Tensor) -> Tensor:
    raise RuntimeError("this kernel is broken\nin two lines")


def norm_of(*providers: Provider) -> Workload:
    """layer_norm alone, by these providers."""
    variants = (NormVariant("layer_norm", "layer_norm"),)
    sizes = (WORKLOAD.name, WORKLOAD.sizes, WORKLOAD.swept, WORKLOAD.bound)
    return Workload(*sizes, variants, WORKLOAD.shapes, ((4, 40),), providers, small_repeats=3)


def run(workload: Workload, **options: object) -> tuple[dict[str, list[record.Record]], Request]:
    """Its records by provider."""
    request = Request(CPU, torch.float32, small=True, **options)  # type: ignore[arg-type]
    found: dict[str, list[record.Record]] = {}
    for one in workload.run(request):
        found.setdefault(one.provider, []).append(one)
    return found, request


@pytest.mark.parametrize(
    ("spoil", "said"),
    (
        (_off_by_a_tenth, "output 0"),
        (_WrongGradient.apply, "gradient of "),
        (lambda y: y * float("nan"), "output 0"),
        (_raise, "RuntimeError: this kernel is broken"),
    ),
)
def test_a_wrong_provider_gets_no_speed(spoil: Callable[[Tensor], Tensor], said: str) -> None:
    found, _ = run(norm_of(Torch(), Planted("planted", spoil), Planted("right", lambda y: y)))
    (wrong,) = found["planted"]
    assert not wrong.match and wrong.clock == NO_MATCH
    assert wrong.match_detail.startswith(said) and "\n" not in wrong.match_detail
    assert (
        wrong.median_seconds is wrong.p20_seconds is wrong.gigabytes_per_second is wrong.share_of_copy is None
    )
    for name in ("torch", "right"):
        assert [one.direction for one in found[name]] == ["forward", "backward", "both"]
        assert all(one.match and one.clock == "host" and one.median_seconds for one in found[name])
        # On a CPU there is nothing that a rate could be of.
        assert all(one.gigabytes_per_second is one.share_of_copy is None for one in found[name])


def test_what_is_not_finite_at_the_shape_that_is_timed_gets_no_speed() -> None:
    def spoil(y: Tensor) -> Tensor:
        return y * torch.where(
            torch.arange(len(y))[:, None] < 64, 1.0, float("nan")
        )  # past the rows compared

    found, _ = run(norm_of(Planted("planted", spoil)), shapes=((70, 40),))
    assert {one.clock for one in found["planted"]} == {NO_MATCH}
    assert all(one.match_detail == "not finite at the shape timed" for one in found["planted"])


def test_a_wrong_kernel_of_ours_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = llmkernels.layer_norm
    monkeypatch.setattr(llmkernels, "layer_norm", lambda *a, **k: _off_by_a_tenth(right(*a, **k)))
    arguments = ["layer_norm", "--device", "cpu", "--shapes", "4x40", "--providers", "llmkernels"]
    assert command.main([*arguments, "--save", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer_norm  ")]
    assert lines and all(" NO " in line and NO_MATCH in line for line in lines)


# --- who is there


def test_a_peer_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peer_that_breaks.py").write_text("raise OSError('no such library')")
    (tmp_path / "peer_that_lacks.py").write_text("import surely_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    peers = []
    for name in ("surely_not_there", "surely_not_there.inside", "peer_that_breaks", "peer_that_lacks"):
        peer = Planted(name, lambda y: y)
        peer.module, peer.distribution = name, "a-peer"
        peers.append(peer)
    monkeypatch.setitem(command.OPS, "layer_norm", norm_of(Torch(), *peers))
    assert command.main(["layer_norm", "--device", "cpu", "--save", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "not measured: surely_not_there: not installed (pip install a-peer)" in said
    assert "not measured: surely_not_there.inside: not installed (pip install a-peer)" in said
    assert "not measured: peer_that_breaks: can't be imported: OSError: no such library" in said
    assert "not measured: peer_that_lacks: installed without surely_not_there, which it needs" in said
    (path,) = tmp_path.glob("*.json")
    environment, records = record.load(path)
    assert environment["not_measured"]["surely_not_there"].startswith("not installed")  # type: ignore[index]
    assert {one.provider for one in records} == {"torch"}


def test_every_provider_says_why_it_is_missing_or_builds() -> None:
    """None of them crashes, whatever is installed here."""
    for workload in command.OPS.values():
        for provider in workload.providers:
            reason = provider.missing()
            assert reason is None or reason


def test_what_a_provider_does_not_have_is_a_note() -> None:
    class Lacking(Planted):
        def layer_norm(self, case: Case) -> Function:
            raise Unavailable("has no such norm")

    found, request = run(norm_of(Lacking("lacking", lambda y: y)))
    assert found == {} and request.notes == {"lacking: layer_norm": "has no such norm"}


def test_the_time_box() -> None:
    found, request = run(norm_of(Torch()), seconds=-1.0)
    assert found == {} and request.notes == {"layer_norm 4x40": "not begun: the time was up"}


# --- every workload


@pytest.mark.parametrize("op", sorted(set(command.OPS) - {"sentence_encoder"}))
def test_every_variant_matches_in_cpu_mode(op: str) -> None:
    """torch's and ours; the kernels through the interpreter, whose time is no speed and not taken."""
    wanted = ("torch", "llmkernels", "llmkernels triton")
    shapes = (SHAPES[op],) if op in SHAPES else None
    request = Request(CPU, torch.float32, small=True, shapes=shapes, wanted=wanted)
    workload = command.OPS[op]
    records = workload.run(request)
    assert not [one for one in records if not one.match]
    assert {one.variant for one in records} == {variant.name for variant in workload.variants}
    interpreted = [one for one in records if one.provider == "llmkernels triton"]
    assert len(interpreted) == (len(workload.cases(request)) if TRITON_IS_INTERPRETED else 0)
    assert all(one.clock == INTERPRETED and one.median_seconds is None for one in interpreted)
    assert all("triton" in one.served_by for one in interpreted)
    assert request.mode == "chosen shapes or providers"


def test_the_sentence_encoder_matches_in_cpu_mode() -> None:
    pytest.importorskip("transformers")
    records = command.OPS["sentence_encoder"].run(
        Request(CPU, torch.float32, True, wanted=("torch", "llmkernels"))
    )
    assert {one.provider for one in records if one.match} == {"torch", "llmkernels"}
    assert not [one for one in records if not one.match]


class _Scaled(Torch):
    """torch with every output two percent too large."""

    name = "scaled"

    def _prepared(self, function: Function) -> Function:
        def scaled(tensors: Tensors) -> object:
            found = function(tensors)
            return tuple(y * 1.02 for y in found) if isinstance(found, tuple) else found * 1.02

        return scaled  # type: ignore[return-value]


class _WithoutDropout(Torch):
    name = "without dropout"

    def add_layer_norm(self, case: Case) -> Function:
        return formulas.add_layer_norm(0.0)

    def attention(self, case: Case) -> Function:
        return lambda tensors: F.scaled_dot_product_attention(**tensors, is_causal=True)

    def feed_forward(self, case: Case) -> Function:
        return formulas.feed_forward("gelu", 0.0)


class _Rescaled(Torch):
    """Attention of another dropout, its output grown by a factor."""

    name = "rescaled"

    def __init__(self, dropout_p: float, factor: float) -> None:
        self._dropout_p = dropout_p
        self._factor = factor

    def attention(self, case: Case) -> Function:
        return lambda tensors: (
            self._factor
            * F.scaled_dot_product_attention(**tensors, dropout_p=self._dropout_p, is_causal=True)
        )


@pytest.mark.parametrize(
    "op", ("attention", "attention_varlen", "attention_decode", "layer_norm", "feed_forward")
)
def test_every_variant_can_fail(op: str) -> None:
    workload = command.OPS[op]
    request = Request(CPU, torch.float32, small=True, shapes=(SHAPES[op],) if op in SHAPES else None)
    for case in workload.cases(request):
        drops = getattr(case.variant, "dropout_p", 0.0) > 0
        wrong: list[Torch] = [_WithoutDropout()] if drops else [_Scaled()]
        if drops and op == "attention":
            # Drops without making up for it; makes up for what it does not drop.
            wrong += [_Rescaled(0.1, 0.9), _Rescaled(0.0, 1 / 0.9)]
        tensors = case.variant.tensors(case.shape, case.dtype, CPU)
        for provider in wrong:
            function = getattr(provider, case.variant.op)(case)
            verdict = case.variant.match(function, case.shape, tensors)
            assert not verdict.match, f"{case.variant.name}, {provider.name}: {verdict.detail}"


def test_the_share_that_dropout_keeps() -> None:
    assert kept_as_often_as_asked(0.9, 10_000, 0.1).match
    assert kept_as_often_as_asked(0.91, 10_000, 0.1).match
    assert not kept_as_often_as_asked(0.92, 10_000, 0.1).match
    assert not kept_as_often_as_asked(0.88, 10_000, 0.1).match


# --- clocks


def test_runs_take_turns_and_one_that_fails_stops_no_other() -> None:
    order: list[str] = []

    def fail() -> None:
        order.append("c")
        raise RuntimeError("out of memory")

    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fail}
    found = measure.interleaved(runs, CPU, repeats=4)
    assert isinstance(found["c"], RuntimeError) and order.count("c") == 1
    for name in ("a", "b"):
        times = found[name]
        assert isinstance(times, measure.Times) and times.clock == "host" and len(times.seconds) == 4
        assert times.p20 <= times.median <= times.p80
    # Each round begins with another one.
    assert order[:9] == ["a", "b", "c", "b", "a", "a", "b", "a", "b"]


def test_directions() -> None:
    tensors = NormVariant("layer_norm", "layer_norm").tensors((4, 40), torch.float32, CPU)
    assert list(directions(formulas.layer_norm, tensors, True)) == ["forward", "backward", "both"]
    assert list(directions(formulas.layer_norm, tensors, False)) == ["forward", "both"]
    assert list(directions(lambda t: formulas.layer_norm(t).detach(), tensors, True)) == ["forward"]
    forward = directions(formulas.layer_norm, tensors, True)["forward"]()
    assert isinstance(forward, Tensor) and not forward.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_graphs_are_replayed_and_shares_are_of_the_same_run() -> None:
    request = Request(torch.device("cuda"), torch.bfloat16, shapes=((4096, 1024),))
    found: dict[str, list[record.Record]] = {}
    for one in norm_of(Torch(), Planted("planted", _off_by_a_tenth)).run(request):
        found.setdefault(one.provider, []).append(one)
    assert [one.clock for one in found["planted"]] == [NO_MATCH]
    assert [one.direction for one in found["torch"]] == ["forward", "backward", "both"]
    for one in found["torch"]:
        assert one.match and one.clock == "cuda graph" and one.peak_bytes
        assert one.share_of_copy is not None and 0 < one.share_of_copy < 1.2


# --- what is written


def test_the_command_writes_json_csv_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["layer_norm", "--device", "cpu", "--shapes", "4x40", "3x33", "--dtype", "float32"]
    assert command.main([*arguments, "--providers", "torch", "llmkernels", "--save", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "CPU mode" in said and "us host" in said and "TFLOP/s" not in said and "GB/s" not in said
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".csv", ".png"}
    assert all(path.name.startswith("layer_norm-float32-") for path in files.values())
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    environment, records = record.load(files[".json"])
    assert environment["timed_on"] == "cpu" and {"torch", "commit", "device"} <= (
        environment.keys() | environment["versions"].keys()  # type: ignore[attr-defined]
    )
    assert len(records) == 5 * 2 * 2 * 3  # variants, shapes, providers, directions
    with files[".csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records)
    assert rows[0]["provider"] == records[0].provider and rows[0]["match"] == "True"
    assert float(rows[0]["median_seconds"]) == records[0].median_seconds


def test_what_was_found_survives_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(y: Tensor) -> Tensor:
        raise KeyboardInterrupt

    wrong = Planted("wrong", _off_by_a_tenth)
    monkeypatch.setitem(command.OPS, "layer_norm", norm_of(wrong, Planted("interrupted", interrupt)))
    with pytest.raises(KeyboardInterrupt):
        command.main(["layer_norm", "--device", "cpu", "--save", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    assert [row["provider"] for row in json.loads(path.read_text())["records"]] == ["wrong"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (["cure"], "argument op: expected of attention"),
        (["attention", "--shapes", "8"], "attention takes batch x length"),
        (["attention", "--shapes", "8xx"], "expected numbers such as 8x2048, got '8xx'"),
    ),
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_grid_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    said = capsys.readouterr().out
    for workload in command.OPS.values():
        assert f"{workload.name}: {' x '.join(workload.sizes)}" in said
    assert "8x2048 1x16384" in said and "provider   liger-kernel" in said
