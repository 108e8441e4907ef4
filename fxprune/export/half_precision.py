"""A float16 copy of a model that still takes and gives float32.

Weights and activations are float16 inside; two casts at the border keep the file a drop-in replacement for the float32
one. The cast costs nothing beside the convolutions, and callers need not know the file's precision.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import ExportError

PREFIX = "model."


class Float16Inside(nn.Module):
    """Casts floating inputs to float16, runs a float16 copy of a model, and casts floating outputs back.

    Args:
        model: the model; it is copied.

    Raises:
        ExportError: a parameter or buffer is too large for float16.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        limit = torch.finfo(torch.float16).max
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > limit:
                raise ExportError(
                    f"{name!r} holds {float(tensor.abs().max()):.6g}, more than float16's largest number {limit:g}; "
                    "export with precision='fp32'"
                )
        self.model = copy.deepcopy(model).half()

    def forward(self, *inputs: Tensor) -> Any:
        """The model's output in float32."""
        outputs = self.model(*(x.half() if x.is_floating_point() else x for x in inputs))
        return pytree.tree_map(_to_float32, outputs)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
