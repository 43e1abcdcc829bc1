"""The introductory Transformer language model, trained with torch.nn's layers and with ours.

``python -m examples.language_model`` predicts the characters of Shakespeare's plays one by one. Read the file
from top to bottom: the data, the model of Vaswani et al. (Attention Is All You Need, arXiv 1706.03762) as a
decoder, its training, and what is made of it. The same model is trained twice from one seed on the same
batches, the second time with ``llmkernels.attention`` and after ``llmkernels.replace``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import llmkernels

TEXT = Path(__file__).parent / "data" / "shakespeare.txt"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out."""

    steps: int = 400
    batch: int = 16
    context: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 3
    dropout: float = 0.1
    learning_rate: float = 4e-3
    warmup: int = 100
    evaluate_every: int = 50
    seed: int = 1


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


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of geometrically spaced wavelengths, from which relative positions can be read
    off."""

    def __init__(self, width: int, longest: int) -> None:
        super().__init__()
        position = torch.arange(longest).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.stack((torch.sin(position * frequency), torch.cos(position * frequency)), dim=-1)
        self.register_buffer("table", table.flatten(1), persistent=False)  # [longest, width]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class CausalSelfAttention(nn.Module):
    """Every position gathers from itself and those before it, in several heads side by side; by torch's
    attention or any other of its signature."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.heads, self.dropout = heads, dropout
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.project_in(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, head_dim]
        dropout = self.dropout if self.training else 0.0
        gathered = self.attend(query, key, value, dropout_p=dropout, is_causal=True)
        return self.project_out(gathered.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention between positions, then a feed-forward network at each; both normalised first and added
    on."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class LanguageModel(nn.Module):
    """Character numbers [batch, length] -> the logits of the next character [batch, length, alphabet]."""

    def __init__(self, alphabet: int, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.embedding = nn.Embedding(alphabet, width)
        self.position = PositionalEncoding(width, settings.context)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.Sequential(
            *(Block(width, settings.heads, settings.dropout) for _ in range(settings.layers))
        )
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, alphabet)

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.dropout(self.position(self.embedding(numbers)))
        return self.to_logits(self.norm(self.blocks(x)))


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
    """``length`` characters after the prompt, each drawn from softmax(logits / temperature)."""
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    numbers = text.encode(prompt).unsqueeze(0)
    for _ in range(length):
        logits = model(numbers[:, -settings.context :].to(device))[:, -1].float().cpu()
        probabilities = F.softmax(logits / temperature, dim=-1)
        numbers = torch.cat((numbers, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
    return text.decode(numbers[0])


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


def largest_difference(first: History, second: History) -> float:
    pairs = zip(first.training, second.training, strict=True)
    return max(abs(a - b) for a, b in pairs)


def build(text: Text, settings: Settings, device: torch.device) -> LanguageModel:
    """The same initial values for the same seed."""
    torch.manual_seed(settings.seed)
    return LanguageModel(len(text.alphabet), settings).to(device)


def use_our_attention(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.attend = llmkernels.attention


def train_on_the_interpreter(text: Text, settings: Settings) -> None:
    """A few small steps with every LayerNorm and every attention, forward and backward, computed by the
    Triton kernels on the CPU; without dropout, of which torch and the kernels draw different masks."""
    small = dataclasses.replace(settings, steps=5, batch=2, context=16, evaluate_every=5, dropout=0.0)
    device = torch.device("cpu")
    expected = train(build(text, small, device), text, small, device, "torch.nn, small")
    model = build(text, small, device)
    report = llmkernels.replace(model, backend="triton", verify=False)
    if report.skipped:
        print(f"Not trained on the Triton kernels through their interpreter: {report.skipped[0].reason}")
        return
    use_our_attention(model)
    with llmkernels.use_backend("triton"):
        actual = train(model, text, small, device, "Triton kernels, interpreted")
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

    model = build(text, settings, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(text.alphabet)} characters, {settings.steps} steps on {device}\n")
    histories["torch.nn"] = train(model, text, settings, device, "torch.nn")

    model = build(text, settings, device)
    report = llmkernels.replace(model)
    use_our_attention(model)
    histories["llmkernels"] = train(model, text, settings, device, "llmkernels")
    print(f"\n{report}\n")

    print(f"{'':12}{'training loss':>15}{'validation loss':>17}{'seconds':>10}")
    for name, history in histories.items():
        print(
            f"{name:12}{history.training[-1]:15.5f}{history.validation[-1][1]:17.5f}{history.seconds:10.1f}"
        )
    stock, ours = histories.values()
    print(f"Largest difference of a step's training loss: {largest_difference(stock, ours):.1e}")
    if device.type == "cuda":
        print(f"Speed-up of the whole training: {stock.seconds / ours.seconds:.2f} x\n")
    else:
        print("(On a CPU both run torch's own operators, at their speed. The kernels themselves:)\n")
        train_on_the_interpreter(text, settings)

    plot, checkpoint = output / "loss.png", output / "language_model.safetensors"
    save_plot(histories, plot)
    save_checkpoint(model, text, settings, checkpoint)
    print(f"\n{generate(model, text, prompt, length, temperature, settings, device)}\n")
    print(f"Loss plot: {plot}\nCheckpoint: {checkpoint}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help=" ")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" ")
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
