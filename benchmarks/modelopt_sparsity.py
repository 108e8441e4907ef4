"""NVIDIA modelopt's one-shot 2:4 sparsity, for comparison.

Installed beside fxprune: `pip install nvidia-modelopt requests huggingface_hub`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Sequence

from torch import Tensor, nn

PATTERN = "2:4"
"""The only pattern that modelopt's SparseGPT is documented for."""


def is_installed() -> bool:
    """Whether modelopt can be imported, with all that it needs; said at once, not after the hours before its turn."""
    if importlib.util.find_spec("modelopt") is None:
        return False
    importlib.import_module("modelopt.torch.sparsity")
    return True


def prune(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Prune a copy of the model by modelopt's "sparsegpt" mode, with its own settings, on calibration batches.

    It takes its masks from SparseGPT and puts them on the dense weights; its groups of four run along (C, ky, kx).
    """
    from modelopt.torch import sparsity

    config = {"data_loader": list(batches), "collect_func": lambda batch: batch}
    return sparsity.export(sparsity.sparsify(copy.deepcopy(model), "sparsegpt", config=config))
