"""What a provider is."""

from __future__ import annotations

import importlib

import torch


class Unavailable(Exception):
    """Why a provider does not compute a case; a sentence for the user."""


class Provider:
    """Someone who computes ops: a method for each op, named as a variant's ``op``, takes a Case and returns
    the function that is timed, of the variant's tensors; it raises Unavailable for a case that it does not
    have.

    distribution: what pip installs, and the module whose import must work for it. on_cpu: whether a run on a
    CPU measures it unasked. overwrites_saved: ops whose backward may run only once over a forward.
    """

    name: str
    distribution: str | None = None
    module: str | None = None
    on_cpu: bool = False
    overwrites_saved: frozenset[str] = frozenset()

    def missing(self) -> str | None:
        """Why it can't run at all, or None."""
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if self.module == error.name or self.module.startswith(f"{error.name}."):
                return f"not installed (pip install {self.distribution})"
            return f"installed without {error.name}, which it needs"
        except Exception as error:  # a broken install is a reason like any other
            return f"can't be imported: {type(error).__name__}: {error}"
        return None

    def is_interpreted(self, device: torch.device) -> bool:
        """Whether its kernels run through an interpreter or an emulator there: checked, never timed."""
        return False
