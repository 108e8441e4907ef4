"""Which way to compute a product: a small cost model over the ways there are, all equal to im2col."""

from __future__ import annotations

from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.statistics.patches import patch_cross, patch_gram, patch_sum


def gram(geometry: LayerGeometry, x: Tensor) -> Tensor:
    """X X^T of one batch, (G, D, D), by the cheapest way for this geometry and size."""
    return patch_gram(geometry, x)


def cross_product(geometry: LayerGeometry, x: Tensor, y: Tensor) -> Tensor:
    """Y X^T of one batch, (G, R/G, D), by the cheapest way for this geometry."""
    return patch_cross(geometry, x, y)


__all__ = ["cross_product", "gram", "patch_sum"]
