"""The introductory language model: torch.nn's and ours are one model, which learns, and which writes by its
caches what it would write without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import llmkernels
from examples import language_model
from examples.language_model import LanguageModel, Settings
from llmkernels.nn import KVCache

CPU = torch.device("cpu")
SIZES = {"batch": 2, "context": 16, "width": 16, "heads": 2, "layers": 2, "evaluate-every": 3, "length": 20}
SMALL = [*(f"--{name}={size}" for name, size in SIZES.items()), "--device=cpu"]


@pytest.fixture(scope="module")
def text() -> language_model.Text:
    return language_model.Text(language_model.TEXT.read_text(encoding="ascii"))


def train(
    text: language_model.Text, settings: Settings, layers: ModuleType
) -> tuple[language_model.History, LanguageModel]:
    model = language_model.build(text, settings, CPU, layers)
    return language_model.train(model, text, settings, CPU, layers.__name__), model


def test_it_leaves_a_plot_a_checkpoint_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    pytest.importorskip("triton")
    language_model.main([*SMALL, "--steps", "6", "--output", str(tmp_path / "new"), "--prompt", "To be"])
    printed = capsys.readouterr().out
    assert "2 x attention on torch" in printed
    steps = [line.split() for line in printed.partition("(small batches):\n")[2].splitlines()[:5]]
    assert [row[0] for row in steps] == ["1", "2", "3", "4", "5"]
    torch.testing.assert_close(*(torch.tensor([float(row[i]) for row in steps]) for i in (1, 2)))
    assert "\nTo be" in printed
    plot = (tmp_path / "new" / "loss.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert len(plot) > 10_000
    with safetensors.safe_open(tmp_path / "new" / "language_model.safetensors", "pt") as checkpoint:
        assert "layers.layers.1.self_attn.in_proj_weight" in checkpoint.keys()  # noqa: SIM118
        assert "alphabet" in checkpoint.metadata()


@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_the_loss_curves_match(text: language_model.Text, dropout: float) -> None:
    """From the same initial values and seed, dropout included: each step's loss, within rounding."""
    settings = Settings(
        steps=25, batch=4, context=16, width=32, heads=2, layers=2, dropout=dropout, evaluate_every=10
    )
    (stock, theirs), (ours, model) = (train(text, settings, layers) for layers in (nn, llmkernels.nn))
    assert theirs.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(torch.tensor(ours.training), torch.tensor(stock.training))
    torch.testing.assert_close(torch.tensor(ours.validation), torch.tensor(stock.validation))
    assert language_model.largest_difference(stock, ours, 1) == 0


def test_the_loss_curves_match_on_the_triton_kernels(text: language_model.Text) -> None:
    """The same with every kernel of the layers interpreted."""
    pytest.importorskip("triton")
    settings = Settings(
        steps=3, batch=2, context=8, width=16, heads=2, layers=2, dropout=0.0, evaluate_every=3
    )
    stock, _ = train(text, settings, nn)
    with llmkernels.use_backend("triton"), llmkernels.explain() as calls:
        ours, _ = train(text, settings, llmkernels.nn)
    assert {call.backend for call in calls} == {"triton"}
    assert {call.op for call in calls} == {"attention", "add_layer_norm", "layer_norm", "feed_forward"}
    torch.testing.assert_close(torch.tensor(ours.training), torch.tensor(stock.training))


def test_training_lowers_the_loss_and_repeats(text: language_model.Text) -> None:
    settings = Settings(steps=60, batch=8, context=16, width=32, heads=2, layers=1, warmup=10)
    first, second = (train(text, settings, llmkernels.nn)[0] for _ in range(2))
    assert language_model.largest_difference(first, second) == 0
    assert len(first.training) == 60
    assert first.validation[-1][0] == 60
    assert sum(first.training[-5:]) / 5 < first.training[0] - 1


@pytest.mark.parametrize("layers", (nn, llmkernels.nn), ids=lambda layers: layers.__name__)
def test_the_model_is_causal(layers: ModuleType) -> None:
    settings = Settings(context=16, width=16, heads=2, layers=2)
    torch.manual_seed(0)
    model = LanguageModel(10, settings, layers).eval()
    numbers = torch.randint(10, (1, 16))
    changed = numbers.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 10
    same = (model(numbers) == model(changed)).all(dim=-1)[0]
    assert same[:9].all()
    assert not same[9:].any()


def test_batches_are_stretches_of_the_text_and_what_follows() -> None:
    settings = Settings(batch=4, context=5)
    inputs, targets = language_model.draw_batch(torch.arange(100), settings, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (4, 5)
    assert torch.equal(targets, inputs + 1)


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_text(backend: str) -> None:
    """Prefill, then steps of one character and of several: the full causal forward."""
    settings = Settings(context=12, width=32, heads=2, layers=2)
    torch.manual_seed(0)
    model = LanguageModel(10, settings).eval()
    numbers = torch.randint(10, (2, 12))
    expected = model(numbers)
    caches = [KVCache(2, 12, 2, 16) for _ in range(2)]
    with llmkernels.use_backend(backend):
        pieces = [model(piece, caches) for piece in numbers.split((5, 1, 1, 4, 1), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


@torch.no_grad()
def test_the_compiled_model_takes_two_graphs_to_write() -> None:
    """One for a prompt and one for all the steps after it."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = LanguageModel(10, Settings(context=9, width=16, heads=2, layers=1)).eval()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    numbers = torch.randint(10, (2, 9))
    caches = [KVCache(2, 9, 2, 8)]
    pieces = [compiled(piece, caches) for piece in numbers.split((5, 1, 1, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(numbers))
    assert len(graphs) == 2


class Echo(nn.Module):
    """Stands in for a model: certain of a next character, one more than the last, and remembers its
    context."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.contexts: list[list[int]] = []

    def forward(self, numbers: Tensor, caches: Sequence[KVCache]) -> Tensor:
        before = self.contexts[-1] if caches[0].longest else []
        self.contexts.append(before + numbers[0].tolist())
        for cache in caches:
            cache.attend(*torch.zeros(3, 1, cache.key.shape[1], numbers.shape[1], cache.key.shape[3]))
        following = (numbers + 1) % self.alphabet
        return torch.nn.functional.one_hot(following, self.alphabet) * 1000.0


@pytest.mark.parametrize("context", (8, 7, 1))
@pytest.mark.parametrize("prompt", (1, 5, 20))
def test_writing_beyond_the_context(context: int, prompt: int) -> None:
    """Every character is drawn after as much of the text as the context holds, half of it or more."""
    text = language_model.Text("abcdefghijklmnopqrstuvwxyz" * 2)
    settings = Settings(context=context, width=8, heads=2, layers=2)
    model = Echo(26)
    beginning = text.decode(torch.arange(prompt))
    written = language_model.generate(model, text, beginning, 30, 1.0, settings, CPU)
    assert written == text.decode(torch.arange(prompt + 30) % 26)
    whole = text.encode(written).tolist()
    assert len(model.contexts) == 30
    for i, seen in enumerate(model.contexts):
        end = prompt + i
        assert seen == whole[end - len(seen) : end]
        assert min(end, (context + 1) // 2) <= len(seen) <= context
    # The context is used up before it is shortened.
    assert max(map(len, model.contexts)) == context
