"""What ``replace`` did, site by site: prints as a table, and takes everything back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from .adapters import Adapter
from .verification import Check

REPLACED, ROLLED_BACK, SKIPPED = "replaced", "rolled back", "skipped"
_HEADER = ("site", "kernel", "max error", "torch's", "budget used", "speed-up", "status")
_NUMERIC = range(2, 6)


@dataclasses.dataclass(frozen=True)
class Row:
    """One site, what was done with it and why."""

    name: str
    aliases: tuple[str, ...]  # further names of the same module
    class_name: str
    status: str
    backend: str | None  # what serves the site where it is now; None if that was not found out
    reason: str | None = (
        None  # why it was rolled back or skipped, or what to know about it though it was replaced
    )
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
    ``to_dict()`` is plain data, ready for JSON.
    """

    def __init__(
        self, rows: Sequence[Row], notes: Sequence[str], swapped: Sequence[tuple[str, Adapter, nn.Module]]
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

        A module whose class has changed since, by fully_shard() or by hand, is left alone; a second call does
        nothing.
        """
        restored = []
        for name, adapter, module in self._swapped:
            if type(module) is adapter.replacement:
                adapter.restore(module)
                restored.append(name)
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
        lines = [cells for row in self.rows for cells in _lines(row, reasons)]
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
        footer += [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        if any(check.interpreted for row in self.rows for check in row.checks):
            footer.append("* on the CPU, through the kernel's interpreter or emulator, on small shapes")
        return "\n".join((*table, "", *footer, *self.notes, self._counts()))

    def _counts(self) -> str:
        counts = (len(self.replaced), len(self.rolled_back), len(self.skipped))
        return "{} replaced, {} rolled back, {} skipped".format(*counts)


def _lines(row: Row, reasons: list[str]) -> list[tuple[str, ...]]:
    """The row's cells: a line for the backend that serves the site, one for each further kernel."""
    status = row.status if row.reason is None else f"{row.status} [{reasons.index(row.reason) + 1}]"
    name = " = ".join((row.name or "(the model)", *row.aliases))
    speed_up = "" if row.speed_up is None else f"{row.speed_up:.2f} x"
    here = next((_numbers(check) for check in row.checks if not check.interpreted), ("", "", ""))
    further = [check for check in row.checks if check.interpreted]
    return [
        (name, row.backend or "", *here, speed_up, status),
        *(("", f"{check.backend}*", *_numbers(check), "", "") for check in further),
    ]


def _numbers(check: Check) -> tuple[str, str, str]:
    return f"{check.max_error:.2e}", f"{check.torch_error:.2e}", f"{100 * check.budget_used:.0f} %"
