"""Which way to compute a product: a small cost model over the ways there are, all equal to im2col."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxprune.errors import CalibrationError
from fxprune.geometry import LayerGeometry
from fxprune.statistics.autocorrelation import applies, assemble, box_products, plan_for
from fxprune.statistics.cross_correlation import cross_correlation
from fxprune.statistics.patches import patch_cross, patch_gram
from fxprune.statistics.running_sum import RunningSum

# Products of few channels run well below the rate of one large product; measured on CPUs at 8 to 512 channels.
SMALL_PRODUCT_CHANNELS = 12
LARGE_PRODUCT_CHANNELS = 96  # From here on the shifted products outrun oneDNN's weight gradient.


class GramAccumulator:
    """X X^T summed over batches (N, C, *spatial) or (..., C) and positions, in float64.

    The products of a batch are taken in the batch's own dtype. For shifted products only the C x C blocks of each box are
    added up; the D x D matrix is put together once, at the end.
    """

    def __init__(self, geometry: LayerGeometry) -> None:
        self.geometry = geometry
        self._gram = RunningSum()
        self._boxes: dict[tuple[LayerGeometry, tuple[int, int]], RunningSum] = {}

    def add(self, x: Tensor, geometry: LayerGeometry | None = None) -> None:
        """Add a batch; with the layer's geometry on it, if its padding differs."""
        geometry = geometry or self.geometry
        if applies(geometry) and autocorrelation_pays(geometry, x.shape[2], x.shape[3]):
            boxes = self._boxes.setdefault((geometry, (x.shape[2], x.shape[3])), RunningSum())
            shape = (len(plan_for(geometry, *x.shape[2:]).blocks), geometry.in_channels, geometry.in_channels)
            box_products(geometry, x, boxes.buffer(shape, x))
            boxes.added(x.numel() // geometry.in_channels)
        else:
            shape = (geometry.matrices, geometry.columns, geometry.columns)
            patch_gram(geometry, x, self._gram.buffer(shape, x))
            self._gram.added(x.numel() // geometry.in_channels)

    def total(self) -> Tensor:
        """X X^T, (G, D, D) float64.

        Raises:
            CalibrationError: if no batch was added.
        """
        parts = [assemble(*seen, products.parts()) for seen, products in self._boxes.items()]
        gram = self._gram.total()
        parts += [] if gram is None else [gram]
        if not parts:
            raise CalibrationError("a layer's statistics were asked for before any calibration batch was seen")
        return sum(parts[1:], start=parts[0])


def autocorrelation_pays(geometry: LayerGeometry, height: int, width: int) -> bool:
    """Whether the shifted products of an image cost less than its patch matrix's product with itself."""
    padded = tuple(size + sum(p) for size, p in zip((height, width), geometry.padding, strict=True))
    channels = geometry.in_channels
    shifted = plan_for(geometry, height, width).positions * channels * (channels + SMALL_PRODUCT_CHANNELS)
    return shifted < math.prod(geometry.output_size(padded)) * geometry.columns**2


def cross_product(geometry: LayerGeometry, x: Tensor, y: Tensor) -> Tensor:
    """Y X^T of one batch, layer input x and wanted output y, summed over positions, (G, R/G, D).

    For convolutions this is the gradient of the weight for the output gradient y, which libraries have; large ones of
    stride 1 take less time as shifted products.
    """
    if not geometry.kernel_size or (geometry.is_pointwise and all(s == 1 for s in geometry.stride)):
        return patch_cross(geometry, x, y)
    large = min(geometry.in_channels, geometry.out_channels) >= LARGE_PRODUCT_CHANNELS
    if large and applies(geometry) and not x.is_cuda:
        return cross_correlation(geometry, x, y)
    dims, groups = len(geometry.kernel_size), geometry.groups
    if geometry.transposed:
        shape: tuple[int, ...] = (geometry.in_channels, geometry.out_channels // groups, *geometry.kernel_size)
        padding, more = tuple(before for before, _ in geometry.padding), list(geometry.output_padding)
    else:
        shape = (geometry.out_channels, geometry.in_channels // groups, *geometry.kernel_size)
        x, padding = geometry.padded(x)
        more = [0] * dims
    weight = x.new_empty(1).expand(shape)  # Only its shape is read.
    _, gradient, _ = torch.ops.aten.convolution_backward(
        y, x, weight, None, geometry.stride, padding, geometry.dilation, geometry.transposed, more,
        groups, (False, True, False),
    )  # fmt: skip
    return geometry.to_matrix(gradient)
