"""Which images are held out: nothing is fitted to them, so what is measured on them is an honest score."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.1
LEAST_HELD_OUT = 16
LEAST_IMAGES = 64  # Of fewer, none is held out: all are needed.


def held_out_count(images: int, share: float | None) -> int:
    """How many of a set's images are held out.

    Args:
        images: in the set.
        share: of them, at most 0.5; None takes a tenth, at least 16, of 64 images or more, and none of fewer.
    """
    if share is not None:
        return int(share * images)
    return max(LEAST_HELD_OUT, int(SHARE * images)) if images >= LEAST_IMAGES else 0


def drawn(images: int, count: int, seed: int) -> Tensor:
    """Which images are held out, (images,) bool, `count` of them.

    They are spread evenly over the set, one at random out of each stretch: a set may be sorted by class, or have its
    classes in turn.
    """
    mask = torch.zeros(images, dtype=torch.bool)
    if count:
        bounds = torch.arange(count + 1) * images // count
        where = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mask[bounds[:-1] + (where * (bounds[1:] - bounds[:-1])).long()] = True
    return mask
