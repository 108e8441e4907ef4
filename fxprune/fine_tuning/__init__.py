"""Training a pruned model further, and taking its weights back to the class that it came from."""

from __future__ import annotations

from fxprune.fine_tuning.keep_zeros import KeptZeros, keep_zeros
from fxprune.fine_tuning.original_class import state_dict_for
from fxprune.fine_tuning.recorded_zeros import FilledZeros, FilledZerosWarning, filled_zeros, restore_zeros

__all__ = [
    "FilledZeros",
    "FilledZerosWarning",
    "KeptZeros",
    "filled_zeros",
    "keep_zeros",
    "restore_zeros",
    "state_dict_for",
]
