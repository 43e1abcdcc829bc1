"""llmkernels bench: measures every op and model beside what would compute it otherwise.

Prints a line a measurement and writes JSON, CSV and a plot. Results are held to float64 in the same run;
what does not match gets no speed. bench/README.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config

from . import (
    attention,
    attention_decode,
    attention_varlen,
    feed_forward,
    layer_norm,
    plots,
    record,
    screen,
)
from .case import Shape
from .models import encoder_layer, language_model, sentence_encoder
from .workload import Request, Workload

OPS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        *(attention.WORKLOAD, attention_varlen.WORKLOAD, attention_decode.WORKLOAD),
        *(layer_norm.WORKLOAD, feed_forward.WORKLOAD),
        *(encoder_layer.WORKLOAD, sentence_encoder.WORKLOAD),
        *(language_model.TRAINING, language_model.GENERATION),
    )
}


# Of one function: shapes of the check and of the timing, with and without gradients, by several compilers.
_COMPILED_FORMS = 64


def _shape(text: str) -> Shape:
    try:
        return tuple(int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 8x2048, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").splitlines()[0].partition(": ")[2]
    parser = argparse.ArgumentParser(prog="llmkernels bench", description=summary)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument(
        "--op", choices=sorted(OPS), action="append", default=[], help="one more op; may be repeated"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="AxB", help="instead of the grid of the op (--list)"
    )
    parser.add_argument(
        *("--providers", "--provider"),
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="only these, patterns such as 'llmkernels*' among them; default: all that are installed",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="small shapes; the default off the GPU")
    parser.add_argument("--seconds", type=float, help="begin no case later than this, for each op")
    parser.add_argument(
        *("--save", "--output"),
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="folder for JSON, CSV and PNG; default: bench-results",
    )
    parser.add_argument("--list", action="store_true", help="the grid: ops, variants, shapes, providers")
    return parser


def _grid() -> Iterator[str]:
    for workload in OPS.values():
        yield f"{workload.name}: {' x '.join(workload.sizes)}"
        yield f"  shapes     {' '.join('x'.join(map(str, shape)) for shape in workload.shapes)}"
        yield f"  variants   {'; '.join(variant.name for variant in workload.variants)}"
        for provider in workload.providers:
            reason = provider.missing()
            yield f"  provider   {provider.name}{f': {reason}' if reason else ''}"


@contextlib.contextmanager
def _settings(device: torch.device) -> Iterator[None]:
    """What torch has to be told for its compiled regions to be timed as they are: a backward that runs again
    over one forward, and an error in place of silent eager execution. Its warnings say which kernels don't
    serve a call, which the notes say too. On a CPU one thread: what calls cost is not a matter of how many
    share their work. A process that is asked to end writes what it has first."""
    functorch, dynamo = torch._functorch.config, torch._dynamo.config

    def stop(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    with (
        functorch.patch(donated_buffer=False),
        dynamo.patch(recompile_limit=_COMPILED_FORMS, fail_on_recompile_limit_hit=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)
        before, threads = signal.signal(signal.SIGTERM, stop), torch.get_num_threads()
        if device.type == "cpu":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            torch.set_num_threads(threads)


def _write(
    stem: Path, workload: Workload, records: list[record.Record], environment: dict[str, object]
) -> str:
    record.save(stem, environment, records)
    try:
        plots.draw(stem.with_suffix(".png"), workload, records, environment)
    except ModuleNotFoundError as error:
        return f"wrote {stem}.json and .csv; the plot needs {error.name}: pip install 'llmkernels[bench]'"
    return f"wrote {stem}.json, .csv and .png"


def _measure(workload: Workload, request: Request, save: Path) -> list[record.Record]:
    """Runs one workload and keeps whatever it found, even where it is stopped."""
    shown = screen.new()
    found: list[record.Record] = []

    def report(one: record.Record) -> None:
        found.append(one)
        shown.write(screen.line(one))

    request.report, request.advance = report, shown.advance
    about = record.environment(request.device)
    about["gpu_before"] = record.gpu_state(request.device)
    shown.begin(workload.name, len(workload.cases(request)))
    dtype = str(request.dtype).removeprefix("torch.")
    shown.write(f"\n{workload.name} ({' x '.join(workload.sizes)}), {dtype}, {about['device']}")
    shown.write(screen.header())
    try:
        workload.run(request)
    finally:
        shown.end()
        about["gpu_after"] = record.gpu_state(request.device)
        about["mode"] = request.mode
        about["not_measured"] = request.notes
        for subject, reason in request.notes.items():
            print(f"not measured: {subject}: {reason}")
        name = "-".join(str(about["device"]).split())
        stem = save / f"{workload.name}-{dtype}-{name}"
        print(_write(stem, workload, found, about), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where the result of a provider of this package does not match."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        parser.error(f"argument op: expected of {', '.join(OPS)}, got {unknown[0]!r}")
    chosen = dict.fromkeys([*options.ops, *options.op]) or OPS
    for op in chosen:
        sizes = OPS[op].sizes
        if options.shapes and any(len(shape) != len(sizes) for shape in options.shapes):
            parser.error(f"argument --shapes: {op} takes {' x '.join(sizes)}")
    if options.list:
        print("\n".join(_grid()))
        return 0
    device = torch.device(options.device)
    small = options.quick or device.type != "cuda"
    options.save.mkdir(parents=True, exist_ok=True)
    if device.type != "cuda":
        print(screen.CPU_MODE)
    failed = 0
    with _settings(device):
        for op in chosen:
            request = Request(
                device,
                getattr(torch, options.dtype),
                small,
                options.shapes,
                tuple(options.providers),
                options.seconds,
            )
            found = _measure(OPS[op], request, options.save)
            failed += sum(not one.match and one.provider.startswith("llmkernels") for one in found)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
