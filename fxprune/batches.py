"""What a loader may yield."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import CalibrationError

EMPTY = "the calibration loader gave no batches; pass a non-empty iterable (a generator can be read only once)"


def first_item(batch: Any, number: int = 0) -> Any:
    """The input in a batch: the batch itself, or the first item of a tuple, list or dict."""
    while isinstance(batch, (tuple, list, dict)):
        if not batch:
            raise CalibrationError(f"calibration batch {number} is an empty {type(batch).__name__}")
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def checked(x: Any, number: int) -> Tensor:
    """The input of batch `number`, or an error if it cannot be calibrated on.

    Raises:
        CalibrationError: if it is no tensor, is empty, or holds NaN or infinite values.
    """
    if not isinstance(x, Tensor):
        raise CalibrationError(
            f"calibration batch {number} is a {type(x).__name__}; expected a tensor, or a tuple, list or dict whose "
            "first item is one"
        )
    if x.dim() == 0 or x.shape[0] == 0:
        raise CalibrationError(f"calibration batch {number} is empty: shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise CalibrationError(f"calibration batch {number} holds NaN or infinite values; check its preprocessing")
    return x


def input_tensor(batch: Any, number: int = 0) -> Tensor:
    """The checked input in a batch."""
    return checked(first_item(batch, number), number)


def read_all(loader: Iterable[Any]) -> Sequence[Any]:
    """All batches of a loader in a list, for what reads them more than once.

    Raises:
        CalibrationError: if there are none.
    """
    batches = loader if isinstance(loader, (list, tuple)) else list(loader)
    if not batches:
        raise CalibrationError(EMPTY)
    return batches
