"""A pretrained sentence encoder becomes a classifier, fine-tuned with its own layers and with ours.

``python -m examples.classification`` puts a linear layer on all-MiniLM-L6-v2 (see examples/encoder.py) and
fine-tunes both to tell what a shop's customers write about: 120 sentences of examples/data/requests.tsv to
learn from, 40 others to be sorted. It does so twice from one seed, the second time after
``llmkernels.replace``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import llmkernels

from .encoder import load, mean_of_tokens

REQUESTS = Path(__file__).parent / "data" / "requests.tsv"
SENTENCES = (
    "The courier left it out in the rain.",
    "You took the money twice!",
    "Can I have it in yellow?",
    "The heel came off, so I am sending them back.",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out."""

    steps: int = 24
    batch: int = 16
    learning_rate: float = 2e-4
    seed: int = 1


# ------------ data ------------


class Requests(NamedTuple):
    """Sentences and what each is about."""

    sentences: list[str]
    labels: Tensor  # [sentences], numbers of the topics


def read(path: Path) -> tuple[list[str], Requests, Requests]:
    """The topics, the sentences to learn from, and every fourth one, held out."""
    rows = [line.split("\t") for line in path.read_text(encoding="ascii").splitlines()]
    topics = sorted({topic for topic, _ in rows})

    def requests(chosen: list[list[str]]) -> Requests:
        return Requests(
            [sentence for _, sentence in chosen], torch.tensor([topics.index(topic) for topic, _ in chosen])
        )

    held_out = rows[::4]
    return topics, requests([row for i, row in enumerate(rows) if i % 4]), requests(held_out)


# ------------ model ------------


class Classifier(nn.Module):
    """A linear layer on the mean of an encoder's hidden states. The encoder's arguments -> [sentences,
    topics]."""

    def __init__(self, encoder: Any, topics: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.to_topics = nn.Linear(encoder.config.hidden_size, topics)

    def forward(self, **batch: Tensor) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        return self.to_topics(mean_of_tokens(hidden, batch["attention_mask"]))


def tokens(tokenizer: Any, sentences: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    return dict(tokenizer(list(sentences), padding=True, return_tensors="pt").to(device))


# ------------ training ------------


class Result(NamedTuple):
    losses: list[float]  # of each step
    found: Tensor  # [held-out sentences], the topics that it takes them for
    seconds: float  # of the training


def fine_tune(
    model: Classifier,
    tokenizer: Any,
    training: Requests,
    held_out: Requests,
    settings: Settings,
    device: torch.device,
    name: str,
) -> Result:
    """AdamW on cross-entropy, the new layer ten times as fast as the pretrained ones; then the held-out
    sentences."""
    torch.manual_seed(settings.seed)  # dropout
    generator = torch.Generator().manual_seed(settings.seed)  # batches
    rate = settings.learning_rate
    optimizer = torch.optim.AdamW(
        [
            {"params": model.encoder.parameters(), "lr": rate},
            {"params": model.to_topics.parameters(), "lr": 10 * rate},
        ]
    )
    losses = []
    model.train()
    start = time.perf_counter()
    progress = tqdm(range(settings.steps), desc=name, unit="step", dynamic_ncols=True)
    for _ in progress:
        drawn = torch.randperm(len(training.sentences), generator=generator)[: settings.batch]
        batch = tokens(tokenizer, [training.sentences[i] for i in drawn.tolist()], device)
        loss = F.cross_entropy(model(**batch), training.labels[drawn].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    seconds = time.perf_counter() - start
    return Result(losses, probabilities(model, tokenizer, held_out.sentences, device).argmax(dim=1), seconds)


@torch.no_grad()
def probabilities(model: nn.Module, tokenizer: Any, sentences: Sequence[str], device: torch.device) -> Tensor:
    """[sentences, topics]"""
    model.eval()
    return F.softmax(model(**tokens(tokenizer, sentences, device)), dim=1).cpu()


# ------------ results ------------


def confusion(right: Tensor, found: Tensor, topics: int) -> Tensor:
    """[topics, topics]: how many sentences about the one are taken for the other."""
    return torch.bincount(right * topics + found, minlength=topics**2).view(topics, topics)


def print_confusion(table: Tensor, topics: Sequence[str]) -> None:
    width = max(map(len, topics)) + 2
    print("Held-out sentences: a row is what they are about, a column what they are taken for")
    print("".join(f"{topic:>{width}}" for topic in ("", *topics)))
    for topic, row in zip(topics, table.tolist(), strict=True):
        print(f"{topic:>{width}}" + "".join(f"{count:>{width}}" for count in row))


def run(settings: Settings, device: torch.device, sentences: Sequence[str]) -> dict[str, Result]:
    """The whole program."""
    topics, training, held_out = read(REQUESTS)
    counts = (len(training.sentences), len(held_out.sentences))
    print("{} sentences to learn from, {} held out\n".format(*counts))
    results = {}
    for name in ("transformers", "llmkernels"):
        tokenizer, encoder = load(device)
        torch.manual_seed(settings.seed)  # the new layer
        model = Classifier(encoder, len(topics)).to(device)
        if name == "llmkernels":
            sample = tokens(tokenizer, held_out.sentences[:4], device)
            report = llmkernels.replace(model, sample_inputs=sample, interpret=False)
        results[name] = fine_tune(model, tokenizer, training, held_out, settings, device, name)
    print(f"\nllmkernels.replace: {str(report).splitlines()[-1]}, each verified against float64\n")

    print(f"{'':14}{'first loss':>12}{'last loss':>12}{'accuracy':>11}{'seconds':>10}")
    for name, (losses, found, seconds) in results.items():
        accuracy = (found == held_out.labels).double().mean()
        print(f"{name:14}{losses[0]:12.5f}{losses[-1]:12.5f}{accuracy:11.1%}{seconds:10.1f}")
    pairs = zip(*(result.losses for result in results.values()), strict=True)
    print(f"Largest difference of a step's loss: {max(abs(a - b) for a, b in pairs):.1e}\n")
    print_confusion(confusion(held_out.labels, results["llmkernels"].found, len(topics)), topics)
    print("\nThe trained model sorts other sentences, too")
    for sentence, row in zip(sentences, probabilities(model, tokenizer, sentences, device), strict=True):
        print(f"{topics[int(row.argmax())]:>10} {float(row.max()):7.1%}   {sentence}")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "sentences", nargs="*", default=SENTENCES, help="sentences of your own, for the trained model to sort"
    )
    meanings = {
        "steps": "training steps",
        "batch": "sentences in each step",
        "learning_rate": "of the pretrained layers",
        "seed": "of the new layer, the batches and dropout",
    }
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{meanings[field.name]} (default: %(default)s)",
        )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (%(default)s)"
    )
    options = vars(parser.parse_args(arguments))
    device, sentences = torch.device(options.pop("device")), options.pop("sentences")
    run(Settings(**options), device, sentences)


if __name__ == "__main__":
    main()
