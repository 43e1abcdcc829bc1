"""What ``replace`` did, site by site: prints as a table, and takes everything back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from .adapters import Adapter
from .verification import Check

REPLACED, ROLLED_BACK, SKIPPED = "replaced", "rolled back", "skipped"
_HEADER = ("site", "class", "kernel", "max error", "torch's", "budget used", "speed-up", "status")
_NUMERIC = range(3, 7)


@dataclasses.dataclass(frozen=True)
class Row:
    """One site, what was done with it and why."""

    name: str
    aliases: tuple[str, ...]  # further names of the same module
    class_name: str
    status: str
    # What serves the site where it is now: a backend or, of several ops, each backend's; None if that was not
    # found out, or there is nothing to serve.
    backend: str | None
    # Why it was rolled back or skipped, or what to know about it though it was replaced.
    reason: str | None = None
    checks: tuple[Check, ...] = ()
    speed_up: float | None = None  # torch's time over ours, forward and backward, where the site is on a GPU

    @property
    def worst(self) -> Check | None:
        """The check that comes closest to its budget, or exceeds it most."""
        return max(self.checks, key=lambda check: check.budget_used, default=None)


class Report:
    """The rows of one ``replace``, in the model's order, and the way back.

    ``undo()`` gives every module that still has our class its own again; as a context manager the report
    undoes at the end of the block. ``replaced``, ``rolled_back`` and ``skipped`` are the rows of each status;
    ``to_dict()`` is plain data, ready for JSON. Printed, sites that differ by a number in their name alone
    share a line, which has the worst of each column.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        notes: Sequence[str],
        swapped: Sequence[Sequence[tuple[str, Adapter, nn.Module]]],  # the parts of each site, itself first
    ) -> None:
        self.rows = list(rows)
        self.notes = list(notes)
        self._swapped = list(swapped)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.status == REPLACED]

    @property
    def rolled_back(self) -> list[Row]:
        return [row for row in self.rows if row.status == ROLLED_BACK]

    @property
    def skipped(self) -> list[Row]:
        return [row for row in self.rows if row.status == SKIPPED]

    def undo(self) -> list[str]:
        """Restores the classes and returns the names of the modules it touched.

        A site whose class has changed since, by fully_shard() or by hand, is left alone; a second call does
        nothing.
        """
        restored = []
        for parts in self._swapped:
            for name, adapter, module in parts:
                if adapter.restore(module):
                    restored.append(name)
                elif module is parts[0][2]:
                    break
        self._swapped = []
        return restored

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def to_dict(self) -> dict[str, Any]:
        """The rows and notes as dicts, lists, strings and numbers."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __repr__(self) -> str:
        return f"<llmkernels.replacement.Report: {self._counts()}>"

    def __str__(self) -> str:
        if not self.rows:
            return "replace: the model has no layer of a kind that this package replaces"
        reasons = list(dict.fromkeys(row.reason for row in self.rows if row.reason is not None))
        groups = _grouped(self.rows)
        lines = [cells for rows in groups for cells in _lines(rows, reasons)]
        rule = tuple("-" * max(map(len, column)) for column in zip(_HEADER, *lines, strict=True))
        table = [
            "  ".join(
                cell.rjust(len(dashes)) if column in _NUMERIC else cell.ljust(len(dashes))
                for column, (cell, dashes) in enumerate(zip(cells, rule, strict=True))
            ).rstrip()
            for cells in (_HEADER, rule, *lines)
        ]
        footer = []
        if any(row.checks for row in self.rows):
            footer.append(
                "max error: outputs against float64; budget used: the worst of outputs and all gradients"
            )
        if len(groups) < len(self.rows):
            footer.append("a line of several sites: the worst of them in each column")
        footer += [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        if any(check.interpreted for row in self.rows for check in row.checks):
            footer.append(
                "* on the CPU, through the kernel's interpreter or emulator, on small shapes, once for all "
                "layers of one kind and size"
            )
        return "\n".join((*table, "", *footer, *self.notes, self._counts()))

    def _counts(self) -> str:
        counts = (len(self.replaced), len(self.rolled_back), len(self.skipped))
        return "{} replaced, {} rolled back, {} skipped".format(*counts)


_NUMBER = re.compile(r"\d+")


def _grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that may share a line: all but the numbers in their names and those of their checks alike."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        kinds = tuple((check.backend, check.interpreted, check.passed) for check in row.checks)
        pattern = _NUMBER.sub("0", row.name)
        key = (pattern, row.aliases, row.class_name, row.status, row.backend, row.reason, kinds)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _name(rows: Sequence[Row]) -> str:
    """The names of a group's sites as one: encoder.layers.0-11.norm1."""
    name = rows[0].name or "(the model)"
    if len(rows) == 1:
        return " = ".join((name, *rows[0].aliases))
    columns = list(zip(*(map(int, _NUMBER.findall(row.name)) for row in rows), strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    several = (_ranges(column) if len(varying) == 1 else "*" for column in varying)
    parts = [_NUMBER.split(name)[0]]
    for column, behind in zip(columns, _NUMBER.split(name)[1:], strict=True):
        parts += [next(several) if len(set(column)) > 1 else str(column[0]), behind]
    return f"{''.join(parts)} ({len(rows)})"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,5"""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _lines(rows: Sequence[Row], reasons: list[str]) -> list[tuple[str, ...]]:
    """The cells of a group: a line for what serves its sites, one for each further kernel."""
    row = rows[0]
    status = row.status if row.reason is None else f"{row.status} [{reasons.index(row.reason) + 1}]"
    ratios = [each.speed_up for each in rows if each.speed_up is not None]
    speed_up = f"{min(ratios):.2f} x" if ratios else ""
    checks = list(zip(*(each.checks for each in rows), strict=True))
    here = next((_numbers(check) for check in checks if not check[0].interpreted), ("", "", ""))
    further = [check for check in checks if check[0].interpreted]
    return [
        (_name(rows), row.class_name, row.backend or "", *here, speed_up, status),
        *(("", "", f"{check[0].backend}*", *_numbers(check), "", "") for check in further),
    ]


def _numbers(checks: Sequence[Check]) -> tuple[str, str, str]:
    return (
        f"{max(check.max_error for check in checks):.2e}",
        f"{max(check.torch_error for check in checks):.2e}",
        f"{100 * max(check.budget_used for check in checks):.0f} %",
    )
