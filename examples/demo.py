"""The main job: a pretrained encoder on these kernels, a classifier made of it, and a language model.

``python -m examples.demo`` runs examples/encoder.py, examples/classification.py and
examples/language_model.py, each of which runs alone, too. Without a GPU every kernel is shown on the CPU:
Triton's through its interpreter, CUDA C++'s through the emulator if a C++ compiler can build it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from . import classification, encoder, language_model


def offer_cuda_kernels() -> None:
    """Makes the CUDA C++ kernels runnable on the CPU, in a checkout of the repository with a C++ compiler."""
    if torch.cuda.is_available() or "LLMKERNELS_EXTENSION" in os.environ:
        return
    print("Building the CUDA C++ kernels for the CPU (once) ...", flush=True)
    try:
        from tests.emulator.build import build

        os.environ["LLMKERNELS_EXTENSION"] = str(build())
    except (ImportError, RuntimeError, OSError) as error:
        print(f"They are left out: {str(error).splitlines()[0]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--steps", default=str(language_model.Settings.steps), help="training steps of the language model"
    )
    parser.add_argument(
        "--seed", default=str(language_model.Settings.seed), help="of initial values, batches and dropout"
    )
    parser.add_argument("--output", default=Path("runs"), type=Path, help="folder of its plot and checkpoint")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    options = parser.parse_args(arguments)

    offer_cuda_kernels()
    _title("1. A pretrained sentence encoder, its layers replaced and verified")
    encoder.main(["--device", options.device])
    _title("2. A classifier, fine-tuned from that encoder with transformers' layers and with llmkernels'")
    classification.main(["--seed", options.seed, "--device", options.device])
    _title("3. A Transformer language model, trained on Shakespeare with torch.nn and with llmkernels")
    language_model.main(
        [
            "--steps",
            options.steps,
            "--seed",
            options.seed,
            "--output",
            str(options.output),
            "--device",
            options.device,
        ]
    )


def _title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


if __name__ == "__main__":
    main()
