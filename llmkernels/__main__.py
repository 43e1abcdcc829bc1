"""``python -m llmkernels``: the command line, also where the package is not installed."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
