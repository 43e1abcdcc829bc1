"""The introductory Transformer language model, trained with torch.nn's layers and with ours.

``python -m examples.language_model`` predicts the characters of Shakespeare's plays one by one. Read the file
from top to bottom: the data, the model of Vaswani et al. (Attention Is All You Need, arXiv 1706.03762) as a
decoder, its training, and what is made of it. The same model is trained twice from one seed on the same
batches: of the layers of torch.nn, and of those of llmkernels.nn, which have the same names, arguments and
parameters. Only the latter have a cache of keys and values, by which the trained model then writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import llmkernels

TEXT = Path(__file__).parent / "data" / "shakespeare.txt"


def _setting(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out."""

    steps: int = _setting(300, "training steps")
    batch: int = _setting(16, "stretches of text in each step")
    context: int = _setting(64, "characters in a stretch, the most that the model looks back")
    width: int = _setting(128, "size of the vector of each position")
    heads: int = _setting(4, "attention heads of each layer")
    layers: int = _setting(3, "layers")
    dropout: float = _setting(0.1, "share of values set to 0 in training")
    learning_rate: float = _setting(4e-3, "the highest, reached after the warm-up")
    warmup: int = _setting(60, "steps in which the learning rate rises")
    evaluate_every: int = _setting(50, "steps between two looks at the held-out text")
    seed: int = _setting(1, "of initial values, batches, dropout and the text written")


# ------------ data ------------


class Text:
    """A text as character numbers; its last tenth is held out for validation."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        self.number_of = {character: number for number, character in enumerate(self.alphabet)}
        numbers = self.encode(text)
        held_out = len(numbers) // 10
        self.training, self.validation = numbers[:-held_out], numbers[-held_out:]

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.number_of[character] for character in text])

    def decode(self, numbers: Tensor) -> str:
        return "".join(self.alphabet[number] for number in numbers.tolist())


def draw_batch(numbers: Tensor, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random stretches of the text and, shifted by one, what follows each character: two of [batch,
    context]."""
    starts = torch.randint(len(numbers) - settings.context - 1, (settings.batch,), generator=generator)
    stretches = torch.stack([numbers[start : start + settings.context + 1] for start in starts.tolist()])
    return stretches[:, :-1], stretches[:, 1:]


# ------------ model ------------


class LanguageModel(nn.Module):
    """Character numbers [batch, length] -> the logits of the next character [batch, length, alphabet].

    A stack of Transformer layers: in each, every position gathers from itself and those before it
    (attention), then goes through a feed-forward network of its own; both are normalised first and added on.
    layers: the package that the layers come from, llmkernels.nn or torch.nn.
    """

    def __init__(self, alphabet: int, settings: Settings, layers: ModuleType = llmkernels.nn) -> None:
        super().__init__()
        width, dropout = settings.width, settings.dropout
        self.embedding = nn.Embedding(alphabet, width)
        # Attention sees no order: each position adds a vector of its own. torch.nn has no such layer.
        self.position = llmkernels.nn.PositionalEncoding(width, dropout, settings.context, batch_first=True)
        layer = layers.TransformerEncoderLayer(
            width, settings.heads, 4 * width, dropout, activation="relu", batch_first=True, norm_first=True
        )
        self.layers = layers.TransformerEncoder(
            layer, settings.layers, norm=layers.LayerNorm(width), enable_nested_tensor=False
        )
        self.to_logits = nn.Linear(width, alphabet)
        future = nn.Transformer.generate_square_subsequent_mask(settings.context)
        self.register_buffer("future", future, persistent=False)

    def forward(self, numbers: Tensor, caches: Sequence[llmkernels.nn.KVCache] | None = None) -> Tensor:
        """caches: one for each layer, of what was read before; the numbers go on from there."""
        x = self.embedding(numbers)
        if caches is not None:
            x = self.layers(self.position(x, caches[0].lengths), cache=caches)
        else:
            length = numbers.shape[1]
            x = self.layers(self.position(x), mask=self.future[:length, :length], is_causal=True)
        return self.to_logits(x)


# ------------ training ------------


@dataclasses.dataclass
class History:
    """The losses of one training: of each step, and of the held-out text as (step, loss)."""

    training: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, text: Text, settings: Settings, device: torch.device) -> float:
    """The mean over the same few batches each time."""
    generator = torch.Generator().manual_seed(settings.seed)
    model.eval()
    batches = [draw_batch(text.validation, settings, generator) for _ in range(4)]
    losses = [float(loss_of(model, inputs.to(device), targets.to(device))) for inputs, targets in batches]
    model.train()
    return sum(losses) / len(losses)


def train(model: nn.Module, text: Text, settings: Settings, device: torch.device, name: str) -> History:
    """Adam on cross-entropy; the learning rate rises for ``warmup`` steps and falls with the root of the step
    after."""
    torch.manual_seed(settings.seed)  # dropout
    generator = torch.Generator().manual_seed(settings.seed)  # batches
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    warmup = settings.warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))
    )
    history = History()
    model.train()
    start = time.perf_counter()
    progress = tqdm(range(1, settings.steps + 1), desc=name, unit="step", dynamic_ncols=True)
    for step in progress:
        inputs, targets = draw_batch(text.training, settings, generator)
        loss = loss_of(model, inputs.to(device), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.training.append(loss.item())
        if step % settings.evaluate_every == 0 or step == settings.steps:
            history.validation.append((step, validation_loss(model, text, settings, device)))
            progress.set_postfix(
                loss=f"{history.training[-1]:.3f}", validation=f"{history.validation[-1][1]:.3f}"
            )
    history.seconds = time.perf_counter() - start
    return history


# ------------ results ------------


@torch.no_grad()
def generate(
    model: nn.Module,
    text: Text,
    prompt: str,
    length: int,
    temperature: float,
    settings: Settings,
    device: torch.device,
) -> str:
    """``length`` characters after the prompt, each drawn from softmax(logits / temperature).

    Each layer keeps the keys and values of all it has read, so that a step computes one character alone.
    There are positions for ``context`` characters: when they are used up, the later half of the context is
    read again as the beginning of a new one.
    """
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    head_dim = settings.width // settings.heads
    caches = [
        llmkernels.nn.KVCache(1, settings.context, settings.heads, head_dim, device=device)
        for _ in range(settings.layers)
    ]
    numbers = text.encode(prompt)
    unread = numbers[-settings.context :]
    for _ in range(length):
        if caches[0].longest + len(unread) > settings.context:
            for cache in caches:
                cache.reset()
            unread = numbers[-settings.context // 2 :]
        logits = model(unread.unsqueeze(0).to(device), caches)[0, -1].float().cpu()
        unread = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        numbers = torch.cat((numbers, unread))
    return text.decode(numbers)


def save_plot(histories: dict[str, History], path: Path) -> None:
    """Training and validation losses of every run over the steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files: no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    # The runs nearly coincide: the later ones are thin and dashed, so that the first shows through.
    styles = ({"linewidth": 3.0, "alpha": 0.4}, {"linewidth": 1.2, "linestyle": "--"})
    for color, (name, history) in enumerate(histories.items()):
        style = styles[min(color, 1)]
        steps = range(1, len(history.training) + 1)
        axes.plot(steps, history.training, color=f"C{2 * color}", label=f"{name}, training", **style)
        steps, losses = zip(*history.validation, strict=True)
        axes.plot(steps, losses, color=f"C{2 * color + 1}", marker="o", label=f"{name}, validation", **style)
    axes.set(xlabel="training step", ylabel="cross-entropy per character (nats)")
    axes.set_title("Language model on Shakespeare: torch.nn and llmkernels from one seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_checkpoint(model: nn.Module, text: Text, settings: Settings, path: Path) -> None:
    """The parameters as safetensors; alphabet and settings in its metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"alphabet": json.dumps(text.alphabet), "settings": json.dumps(dataclasses.asdict(settings))}
    save_file(tensors, path, metadata)


def largest_difference(first: History, second: History, steps: int | None = None) -> float:
    """Of the training losses, in the first ``steps`` or all."""
    pairs = zip(first.training[:steps], second.training[:steps], strict=True)
    return max(abs(a - b) for a, b in pairs)


def build(text: Text, settings: Settings, device: torch.device, layers: ModuleType) -> LanguageModel:
    """The same initial values for the same seed, whichever package the layers come from."""
    torch.manual_seed(settings.seed)
    return LanguageModel(len(text.alphabet), settings, layers).to(device)


def describe(calls: Sequence[Any]) -> str:
    """How often each operation ran, and on which backend."""
    counts = Counter(f"{call.op} on {call.backend}" for call in calls)
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def train_on_the_interpreter(text: Text, settings: Settings) -> None:
    """A few small steps of one layer, forward and backward, computed by the Triton kernels on the CPU;
    without dropout, of which torch and the kernels draw different masks."""
    small = dataclasses.replace(
        settings, steps=5, batch=2, context=16, layers=1, evaluate_every=5, dropout=0.0
    )
    device = torch.device("cpu")
    expected = train(build(text, small, device, nn), text, small, device, "torch.nn, small")
    model = build(text, small, device, llmkernels.nn)
    with llmkernels.use_backend("triton"), llmkernels.explain() as calls:
        actual = train(model, text, small, device, "Triton kernels, interpreted")
    missing = [call for call in calls if call.backend != "triton"]
    if missing:
        print(f"The Triton kernels can't be interpreted here:\n{missing[0]}")
        return
    print("Loss of each step, torch.nn and the Triton kernels through their interpreter (small batches):")
    for step, pair in enumerate(zip(expected.training, actual.training, strict=True), 1):
        print("{:>5}  {:.6f}  {:.6f}".format(step, *pair))


def run(
    settings: Settings, device: torch.device, output: Path, prompt: str, length: int, temperature: float
) -> None:
    """The whole program."""
    output.mkdir(parents=True, exist_ok=True)
    text = Text(TEXT.read_text(encoding="ascii"))
    histories = {}
    for name, layers in (("torch.nn", nn), ("llmkernels.nn", llmkernels.nn)):
        model = build(text, settings, device, layers)
        if not histories:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print(f"{parameters:,} parameters, {len(text.alphabet)} characters, on {device}\n")
        histories[name] = train(model, text, settings, device, name)

    print(f"\n{'':14}{'training loss':>15}{'validation loss':>17}{'seconds':>10}")
    for name, history in histories.items():
        print(
            f"{name:14}{history.training[-1]:15.5f}{history.validation[-1][1]:17.5f}{history.seconds:10.1f}"
        )
    stock, ours = histories.values()
    early = max(settings.steps // 10, 1)
    print(
        f"Largest difference of the training losses: {largest_difference(stock, ours, early):.1e} in the "
        f"first {early} steps, {largest_difference(stock, ours):.1e} in all\n"
        "(rounding: some sums are taken in another order, and training enlarges what differs)"
    )
    with llmkernels.explain() as calls:
        loss_of(
            model, *(tensor.to(device) for tensor in draw_batch(text.training, settings, torch.Generator()))
        )
    print(f"One forward pass of llmkernels.nn: {describe(calls)}")
    if device.type == "cuda":
        print(f"Speed-up of the whole training: {stock.seconds / ours.seconds:.2f} x\n")
    else:
        print("(On a CPU both run torch's own operators, at their speed. The kernels themselves:)\n")
        train_on_the_interpreter(text, settings)

    plot, checkpoint = output / "loss.png", output / "language_model.safetensors"
    save_plot(histories, plot)
    save_checkpoint(model, text, settings, checkpoint)
    start = time.perf_counter()
    written = generate(model, text, prompt, length, temperature, settings, device)
    seconds = time.perf_counter() - start
    print(
        f"\n{written}\n\n{length} characters written with a cache of keys and values in {seconds:.1f} seconds"
    )
    print(f"Loss plot: {plot}\nCheckpoint: {checkpoint}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, **field.metadata)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), help="folder of the plot and the checkpoint"
    )
    parser.add_argument(
        "--prompt", default="HAMLET.\nTo be, or not to be", help="what the generated text goes on from"
    )
    parser.add_argument("--length", type=int, default=400, help="characters to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 plainer, above 1 wilder")
    options = vars(parser.parse_args(arguments))
    device = torch.device(options.pop("device"))
    others = {name: options.pop(name) for name in ("output", "prompt", "length", "temperature")}
    run(Settings(**options), device, **others)


if __name__ == "__main__":
    main()
