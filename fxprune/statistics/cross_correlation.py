"""The cross term of a stride-1 convolution without im2col.

The R x C block of Y X^T for a kernel offset a is the sum over output positions p of y[p] x[p + a]^T: one product of the
output with the image shifted by a, over the positions at which both are inside. The layout is that of the Hessian without
im2col (`autocorrelation`).
"""

from __future__ import annotations

import itertools

from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.statistics.autocorrelation import CHUNK_ELEMENTS, add_row_products, by_rows, clip


def cross_correlation(geometry: LayerGeometry, x: Tensor, y: Tensor) -> Tensor:
    """Y X^T summed over a batch, (1, R, D): input x (N, C, H, W) and wanted output y (N, R, H', W')."""
    (kernel_y, kernel_x), (dilation_y, dilation_x) = geometry.kernel_size, geometry.dilation
    (above, _), (before, _) = geometry.padding
    if geometry.padding_mode != "zeros":
        x, above, before = geometry.pad(x), 0, 0
    total = x.new_zeros(kernel_y, kernel_x, geometry.out_channels, geometry.in_channels)
    images = max(1, CHUNK_ELEMENTS // max(x[0].numel(), y[0].numel()))
    for part, output in zip(x.split(images), y.split(images), strict=True):
        rows, wanted, n = by_rows(part), by_rows(output), len(part)
        for i, j in itertools.product(range(kernel_y), range(kernel_x)):
            down, along = i * dilation_y - above, j * dilation_x - before
            top, bottom = clip(down, y.shape[2], (0, x.shape[2]))
            left, right = clip(along, y.shape[3], (0, x.shape[3]))
            first = wanted[top - down : bottom - down, (left - along) * n : (right - along) * n]
            add_row_products(total[i, j], first, rows[top:bottom, left * n : right * n])
    return total.permute(2, 0, 1, 3).reshape(1, geometry.rows, geometry.columns)
