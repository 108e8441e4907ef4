"""Writes a pruned GraphModule to one file and reads it back, without running any code that the file brings along.

The file is what ``torch.save`` writes of a dict of plain values and tensors, so ``torch.load(..., weights_only=True)``
reads it: the graph and the modules as JSON text, the weights beside it. Functions and module classes are stored by
name, and only names from a fixed list are looked up (`fxprune.saving.names`), plus those that the caller hands over.
"""

from __future__ import annotations

from fxprune.saving.file import FORMAT, is_saved, load, save

__all__ = ["FORMAT", "is_saved", "load", "save"]
