"""Arrays of images in the forms in which people keep them, as one tensor (N, C, H, W)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxprune.errors import DataError

FORMS = "(N, H, W), (N, H, W, C) or (N, C, H, W), with 1 or 3 channels"
CHANNELS = (1, 3)
HIGHEST_NORMALISED = 32.0  # no normalisation in use gives larger values; bytes that were made floats do


def as_images(raw: npt.NDArray[Any], what: str) -> torch.Tensor:
    """Images as a tensor (N, C, H, W): uint8 for bytes, float32 for floating-point values.

    Whole numbers of another type are taken as bytes if all are in 0..255.

    Args:
        raw: the array.
        what: the array's name, for messages.

    Raises:
        DataError: the array has another shape, or values that are neither bytes, nor in [0, 1], nor normalised.
    """
    found = f"{what}: {raw.dtype} {raw.shape}"
    grey = raw.ndim == 3
    if not grey and not (raw.ndim == 4 and (raw.shape[-1] in CHANNELS or raw.shape[1] in CHANNELS)):
        raise DataError(f"{found}; {FORMS} is needed")
    if grey:
        raw = raw[:, None]
    elif raw.shape[-1] in CHANNELS:
        raw = raw.transpose(0, 3, 1, 2)
    if np.issubdtype(raw.dtype, np.integer):
        if raw.dtype != np.uint8:
            low, high = (int(raw.min()), int(raw.max())) if raw.size else (0, 0)
            if low < 0 or high > 255:
                raise DataError(f"{found} with values from {low} to {high}; whole numbers must be in 0..255")
        return torch.from_numpy(np.ascontiguousarray(raw, dtype=np.uint8))
    if not np.issubdtype(raw.dtype, np.floating):
        raise DataError(f"{found}; bytes (uint8) or floating-point values are needed")
    images = torch.from_numpy(np.ascontiguousarray(raw, dtype=np.float32))
    if images.numel() and not bool(images.isfinite().all()):
        raise DataError(f"{found} holds NaN or infinite values")
    if images.numel() and float(images.abs().max()) > HIGHEST_NORMALISED:
        raise DataError(
            f"{found} with values from {float(images.min()):.4g} to {float(images.max()):.4g}; floating-point images are "
            "in [0, 1], or normalised as the model has it. If these are bytes, write them as uint8"
        )
    return images


def is_normalised(images: torch.Tensor) -> bool:
    """Whether floating-point images are normalised already: some values lie outside [0, 1]."""
    return images.is_floating_point() and bool(images.numel()) and bool((images.min() < 0) | (images.max() > 1))
