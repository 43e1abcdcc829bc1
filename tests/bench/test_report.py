"""The goals table and the READMEs, from made-up results; and the project's READMEs from the real ones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from bench import goals, record, report
from bench.attention import WORKLOAD
from bench.case import Case, Verdict
from bench.goals import GOALS, Goal, outcome
from bench.measure import Ceilings, Times

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.device("cuda")
MARKED = "before 1\n<!-- bench:{0} -->\nstale 9.99\n<!-- /bench:{0} -->\nafter 2\n"


def made_up(
    provider: str,
    seconds: float,
    *,
    variant: str = "full d128",
    direction: str = "forward",
    shape: tuple[int, int] = (1, 16384),
    served_by: str = "",
    match: bool = True,
) -> record.Record:
    """A record of attention whose least time at the made-up ceilings, 1 PFLOP/s, is 1.1 ms at 1x16384."""
    chosen = next(found for found in WORKLOAD.variants if found.name == variant)
    case = Case(chosen, shape, torch.bfloat16, CUDA)
    tensors = {"query": torch.empty(1, dtype=torch.bfloat16)}
    work = chosen.work(shape, tensors, direction)
    times, verdict = Times([seconds] * 5, "cuda graph"), Verdict(match, "made up")
    return record.record(
        *(case, direction, provider, shape[1], verdict, served_by, times.clock, work),
        *(times, Ceilings(copy=4e12, matmul=1e15), 1000),
    )


def environment(**changes: object) -> dict[str, object]:
    return {
        "date": "2030-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "timed_on": "cuda",
        "mode": "published grid",
        "device": "Made-up GPU",
        "versions": {"torch": "2.99", "triton": "3.99"},
        **changes,
    }


FLOPS = 2 * 2 * 16 * 16384**2 * 128
OURS = ("llmkernels triton", FLOPS / 1e15 / 0.95)
FIGURES = (
    made_up(*OURS, served_by="triton"),
    made_up("sdpa cudnn", FLOPS / 1e15 / 0.97),
    made_up("torch", FLOPS / 1e15 / 0.5),
    # A file that gave a speed to what does not match would not be believed.
    made_up("llmkernels cuda", FLOPS / 1e15 / 0.99, served_by="cuda", match=False),
    # The default leaves this call to torch: no result of ours, however fast.
    made_up("llmkernels", FLOPS / 1e15 / 0.99, served_by="torch"),
)


def goal_of(what: str, **changes: object) -> Goal:
    found = next(goal for goal in GOALS if goal.what == what)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def test_goals_met_missed_and_not_measured() -> None:
    met = outcome(goal_of("attention forward d128 16k"), FIGURES)
    assert met.value == pytest.approx(0.95) and met.verdict == "met by 5.6 %"
    against = goal_of("attention forward d128 16k", against=("sdpa cudnn",), target=1.01)
    missed = outcome(against, FIGURES)
    assert missed.value == pytest.approx(0.95 / 0.97) and missed.verdict == "missed by 3.0 %"
    for goal in (goal_of("attention forward d128 16k causal"), goal_of("attention backward d128 16k")):
        assert outcome(goal, FIGURES).verdict == "not measured"
    # What does not match is no result, and a rival that was not measured is not beaten.
    assert (
        outcome(goal_of("attention forward d128 16k", providers=("llmkernels cuda",)), FIGURES).value is None
    )
    assert outcome(goal_of("attention forward d128 16k", against=("flex_attention",)), FIGURES).value is None


def test_of_several_shapes_the_worst_counts_and_all_are_needed() -> None:
    goal = goal_of("attention forward d128 16k", shapes=("1x16384", "8x2048"))
    assert outcome(goal, FIGURES).value is None
    flops = 2 * 2 * 8 * 16 * 2048**2 * 128
    more = (*FIGURES, made_up("llmkernels triton", flops / 1e15 / 0.4, shape=(8, 2048), served_by="triton"))
    assert outcome(goal, more).value == pytest.approx(0.4)


def test_every_goal_names_what_is_measured() -> None:
    """A goal of a variant, shape or provider that no workload has would be "not measured" for ever."""
    from bench.__main__ import OPS

    for goal in GOALS:
        workload = next(
            found for found in OPS.values() if goal.op in {variant.op for variant in found.variants}
        )
        variants = {variant.name for variant in workload.variants if variant.op == goal.op}
        assert {goal.variant, goal.against_variant or goal.variant} <= variants, goal
        assert set(goal.shapes) <= {"x".join(map(str, shape)) for shape in workload.shapes}, goal
        named = [name for pattern in goal.against for name in (pattern.rstrip("*"),)]
        for name in named:
            assert any(provider.name.startswith(name) for provider in workload.providers), goal


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as a run leaves it, with an older run, one on a CPU and one of small shapes beside it."""
    for folder, changes, found in (
        ("new", {}, FIGURES),
        (
            "old",
            {"date": "2029-01-01T00:00:00+00:00"},
            (made_up("llmkernels triton", 1.0, served_by="triton"),),
        ),
    ):
        (tmp_path / folder).mkdir()
        record.save(tmp_path / folder / "attention-bfloat16-Made-up-GPU", environment(**changes), found)
    cpu = environment(timed_on="cpu", device="a CPU")
    record.save(tmp_path / "new" / "attention-bfloat16-a-CPU", cpu, FIGURES)
    small = environment(mode="small shapes", device="Another GPU")
    record.save(tmp_path / "new" / "attention-bfloat16-Another-GPU", small, FIGURES)
    benchmarks = [
        {"group": group, "params": {"path": path}, "stats": {"median": median}}
        for group, path, median in (
            ("norm", "torch", 2.0),
            ("norm", "automatic", 1.0),
            ("attention", "torch", 1.0),
            ("attention", "automatic", 1.25),
            ("attention", "kernel path", 9.0),
        )
    ]
    (tmp_path / "new" / report.OVERHEAD).write_text(json.dumps({"benchmarks": benchmarks}))
    (tmp_path / "new" / "attention-bfloat16-Made-up-GPU.png").write_bytes(b"")
    return tmp_path


def test_the_newest_results_of_a_gpu_count(results: Path) -> None:
    (device,) = report.gather(results)
    assert device.name == "Made-up GPU" and tuple(device.records) == FIGURES
    assert device.overhead == {"norm": 2.0, "attention": 0.8}


def test_the_tables(results: Path) -> None:
    devices = report.gather(results)
    text = report.tables(devices, results)
    assert "Made-up GPU; 2030-01-02, torch 2.99, triton 3.99, commit 0123456789ab." in text
    (row,) = [line for line in text.splitlines() if line.startswith("| attention: full d128")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:4] == ["attention: full d128", "1x16384", "bfloat16", "forward"]
    ours = f"{OURS[1] * 1e6:.1f} (llmkernels triton)"
    cudnn = f"{FLOPS / 1e15 / 0.97 * 1e6:.1f} (sdpa cudnn)"
    assert cells[4:] == [ours, f"{FLOPS / 5e14 * 1e6:.1f}", "", cudnn, "0.98", "0.95 of matmul"]
    assert "![attention-bfloat16-Made-up-GPU](new/attention-bfloat16-Made-up-GPU.png)" in text

    table = report.goals_table(devices)
    assert "| attention forward d128 16k | 0.90 of matmul | 0.95 of matmul | met by 5.6 % |" in table
    assert f"| {goals.HOST_OVERHEAD} | 1.00 x | 0.80 x (attention) | missed by 20.0 % |" in table
    assert table.count("not measured") == len(GOALS) - 2 - 1  # two of the share, one against cuDNN


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    assert report.gather(tmp_path) == []
    assert report.tables([], tmp_path) == report.NOTHING
    table = report.goals_table([])
    assert table.count("not measured") == len(GOALS) + 1
    assert " met" not in table and "missed" not in table


@pytest.mark.parametrize("kind", ("tables", "goals"))
def test_a_readme_is_written_and_held_to_the_results(
    kind: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(MARKED.format(kind))
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1 and "stale" in readme.read_text()
    assert "differs from the results" in capsys.readouterr().err
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before 1\n") and text.endswith("after 2\n")
    assert "0.95 of matmul" in text and "stale" not in text
    assert report.main([*arguments, "--check"]) == 0
    readme.write_text(text.replace("0.95 of matmul", "0.96 of matmul", 1))
    assert report.main([*arguments, "--check"]) == 1


# A rate, a time or a speed-up; what else a README counts is no measurement.
_FIGURE = re.compile(
    r"\d\s*(?:[TG]FLOP/s|[GT]B/s|tokens?/s|[mu]s|µs|ns)\b|\d\s*[x×] (?:faster|as fast|the speed)"
)


def test_a_figure_is_seen() -> None:
    for claim in ("700 TFLOP/s", "in 12.5 us", "1.6x faster", "3 x as fast", "900 tokens/s"):
        assert _FIGURE.search(claim)
    assert not _FIGURE.search("8x2048 on sm_90, 3.11, 44 % less memory")


@pytest.mark.parametrize("path", report.READMES, ids=lambda path: path.parent.name)
def test_the_readmes_hold_the_results_and_no_other_figure(path: Path) -> None:
    """After new results: ``python -m bench.report``."""
    text = path.read_text()
    assert report.rendered(text, report.gather(), path.parent) == text
    assert _FIGURE.search(report.unmarked(text)) is None


def test_the_page_of_the_benchmarks_has_both_tables() -> None:
    text = (ROOT / "bench" / "README.md").read_text()
    assert "<!-- bench:goals -->" in text and "<!-- bench:tables -->" in text
