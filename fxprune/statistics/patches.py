"""Sums over a batch by im2col: the plain way, right for every geometry, and the fastest for few channels.

Patches are unfolded for a few images at a time, so that the copy stays small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry

CHUNK_ELEMENTS = 4 * 2**20
FEW_COLUMNS = 32
BLOCK_POSITIONS = 128
BLOCK_ROWS = 128  # Of a symmetric product, at least: smaller products run below the rate of large ones.
BLOCKS = 8  # At most.


def images_per_chunk(geometry: LayerGeometry, x: Tensor) -> int:
    """How many images' patches fit the chunk size."""
    positions = math.prod(x.shape[2:]) if geometry.kernel_size else math.prod(x.shape[1:-1])
    if geometry.transposed:
        positions = math.prod(geometry.output_shape(x.shape[2:]))
    return max(1, CHUNK_ELEMENTS // max(1, positions * geometry.columns * geometry.matrices))


def patch_gram(geometry: LayerGeometry, x: Tensor, total: Tensor | None = None) -> Tensor:
    """X X^T summed over batch and positions, (G, D, D), by unfolding chunks of images; added to `total` if one is given.

    Of blocks of rows, each is taken from its diagonal on, which with many blocks is half of all; the rest is their mirror.
    """
    columns = geometry.columns
    if total is None:
        total = x.new_zeros(geometry.matrices, columns, columns)
    size = math.ceil(columns / min(max(1, columns // BLOCK_ROWS), BLOCKS))
    for part in x.split(images_per_chunk(geometry, x)):
        patches = geometry.patches(part)
        for start in range(0, columns, size):
            rows = slice(start, start + size)
            add_product(total[:, rows, start:], patches[:, :, rows].mT, patches[:, :, start:])
    for start in range(0, columns, size):
        total[:, start + size :, start : start + size] = total[:, start : start + size, start + size :].mT
    return total


def patch_cross(geometry: LayerGeometry, x: Tensor, y: Tensor) -> Tensor:
    """Y X^T summed over batch and positions, (G, R/G, D), by unfolding chunks of images."""
    total = x.new_zeros(geometry.groups, geometry.rows, geometry.columns)
    size = images_per_chunk(geometry, x)
    for part, output in zip(x.split(size), y.split(size), strict=True):
        add_product(total, geometry.output_matrix(output), geometry.patches(part))
    return total


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add to a sum: total += left @ right, (G, R, D) += (G, R, P) @ (G, P, D).

    BLAS libraries add up long products of few columns one position after the other, and after some thousand a mean much
    larger than the deviation leaves nothing of it: these are taken in short blocks, whose sums are added in float64.
    """
    whole = 0
    if right.shape[2] <= FEW_COLUMNS:
        whole = right.shape[1] // BLOCK_POSITIONS * BLOCK_POSITIONS
        lefts = left[:, :, :whole].unflatten(2, (-1, BLOCK_POSITIONS)).movedim(2, 1)
        rights = right[:, :whole].unflatten(1, (-1, BLOCK_POSITIONS))
        total += (lefts @ rights).sum(1, dtype=torch.float64)
    total.baddbmm_(left[:, :, whole:], right[:, whole:])


def image_sum(x: Tensor) -> Tensor:
    """The sum over a batch, (1, ...) float64: what is linear in x is taken of it in place of every image."""
    # Images are added up in the order in which they lie in memory: in another torch takes ten times as long.
    images = x.sum(0, keepdim=True) if x.is_contiguous() else x.movedim(1, -1).sum(0, keepdim=True).movedim(-1, 1)
    return images.double()
