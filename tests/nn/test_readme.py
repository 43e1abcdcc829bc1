"""The tests that llmkernels/nn/README.md names for its deviations are there."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "llmkernels" / "nn" / "README.md"


def test_every_deviation_has_its_test() -> None:
    table = README.read_text().partition("## Deviations on purpose")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        named = re.search(r"`(test_[\w*]+\.py)::(test_[\w*]+|test_\*\w+\*)`", row)
        assert named, row
        functions = [
            name
            for path in HERE.glob(named[1])
            for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        ]
        assert fnmatch.filter(functions, named[2]), row
