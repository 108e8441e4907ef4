"""The Hessian of a stride-1 convolution without im2col.

H(a, b), the C x C block of X X^T for kernel offsets a and b, is a sum over positions q of x[q] x[q + l]^T with the lag
l = (b - a) * dilation: it depends on a and b only through the lag, except that q runs over the window that offset a sees.
So one product over the whole image per lag serves all blocks of that lag, and each block takes away the border strips
that its window does not see. With k = 3 that is 13 full products in place of 81 and no ninefold patch matrix; the
same "covariance method" is known from linear prediction and from the Wiener filter statistics of video codecs.

The images are laid out as (H, W, N, C), so that in every row both factors of a product are contiguous slices of one
matrix, shifted against each other, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry

CHUNK_ELEMENTS = 8 * 2**20
ROWS_ELEMENTS = 3 * 2**18  # Of all blocks, assembled at a time.
MIRROR_ROWS = 256  # At a time.
BATCHED_CHANNELS = 128  # On a CPU the products of more are large: adding each one up costs less than holding them all.


@dataclass(frozen=True)
class Box:
    """The product x[q] x[q + lag]^T summed over the rows [top, bottom) and columns [left, right) of q, all images."""

    top: int
    bottom: int
    left: int
    right: int
    lag: tuple[int, int]

    @property
    def positions(self) -> int:
        """Number of q in one image."""
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class Plan:
    """The products to take for one geometry and image size, and the signed blocks (a, b) each one goes into."""

    blocks: dict[Box, list[tuple[int, int, int]]]

    @property
    def positions(self) -> int:
        """Positions over all products in one image: C^2 MACs each."""
        return sum(box.positions for box in self.blocks)


def applies(geometry: LayerGeometry) -> bool:
    """Whether the layer is an ungrouped 2-D convolution of stride 1 with more than one kernel position."""
    return (
        len(geometry.kernel_size) == 2
        and geometry.kernel_size != (1, 1)
        and geometry.stride == (1, 1)
        and geometry.matrices == 1
        and not geometry.transposed
    )


def box_products(geometry: LayerGeometry, x: Tensor, total: Tensor | None = None) -> Tensor:
    """The products of all boxes of the plan, (boxes, C, C), summed over a batch (N, C, H, W); added to `total` if given."""
    plan = plan_for(geometry, *x.shape[2:])
    if geometry.padding_mode != "zeros":
        x = geometry.pad(x)
    if total is None:
        total = x.new_zeros(len(plan.blocks), x.shape[1], x.shape[1])
    for part in x.split(max(1, CHUNK_ELEMENTS // x[0].numel())):
        rows, n = by_rows(part), len(part)
        for product, box in zip(total, plan.blocks, strict=True):
            down, along = box.lag
            first = rows[box.top : box.bottom, box.left * n : box.right * n]
            second = rows[box.top + down : box.bottom + down, (box.left + along) * n : (box.right + along) * n]
            add_row_products(product, first, second)
    return total


def by_rows(x: Tensor) -> Tensor:
    """Images (N, C, H, W) as (H, W N, C): the same columns of all images are one contiguous slice of each row."""
    images, channels, height, width = x.shape
    return x.permute(2, 3, 0, 1).reshape(height, width * images, channels)


def add_row_products(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add first^T second to a total (R, C), summed over all rows: (H, P, R) and (H, P, C)."""
    if min(total.shape) <= BATCHED_CHANNELS or total.is_cuda:
        total += torch.bmm(first.mT, second).sum(0)
    else:
        for a, b in zip(first, second, strict=True):
            total.addmm_(a.mT, b)


def assemble(geometry: LayerGeometry, size: tuple[int, int], parts: Sequence[Tensor]) -> Tensor:
    """X X^T, (1, D, D) float64, from the box products of images of the given (height, width).

    Each block is a signed sum of products, so some channels' rows of all blocks are one matrix product with the signs.

    Args:
        geometry: of the layer.
        size: of the images.
        parts: (boxes, C, C) each; their sum counts.
    """
    offsets, channels = geometry.kernel_size[0] * geometry.kernel_size[1], geometry.in_channels
    pairs = [(a, b) for a in range(offsets) for b in range(a, offsets)]
    sign_of = {pair: [0.0] * len(parts[0]) for pair in pairs}
    for box, blocks in enumerate(plan_for(geometry, *size).blocks.values()):
        for a, b, sign in blocks:
            sign_of[a, b][box] += sign
    signs = torch.tensor([*sign_of.values()], dtype=torch.float64, device=parts[0].device)
    # Filled by all threads at once: the first touch of so much memory takes longer than the sums.
    total = signs.new_empty(offsets, channels, offsets, channels).fill_(0)
    by_pair, (firsts, seconds) = total.transpose(1, 2), zip(*pairs, strict=True)
    step = max(1, ROWS_ELEMENTS // (len(pairs) * channels))
    blocks_of_rows = signs.new_empty(len(pairs), step * channels)
    for start in range(0, channels, step):
        some = slice(start, min(start + step, channels))
        products = sum((part[:, some].double() for part in parts[1:]), start=parts[0][:, some].double()).flatten(1)
        torch.mm(signs, products, out=blocks_of_rows[:, : products.shape[1]])
        rows = blocks_of_rows[:, : products.shape[1]].unflatten(1, (-1, channels))
        by_pair[firsts, seconds, some] = rows
    whole = total.view(geometry.columns, geometry.columns)
    for start in range(0, geometry.columns, MIRROR_ROWS):
        stop = start + MIRROR_ROWS
        whole[stop:, start:stop] = whole[start:stop, stop:].mT
        square = whole[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).mT)
    return whole[None]


@lru_cache(maxsize=256)
def plan_for(geometry: LayerGeometry, height: int, width: int) -> Plan:
    """Which products make up H for input images of the given size.

    Zero padding costs nothing: only the image is summed over. With any other padding the image is the padded one.
    """
    (kernel_y, kernel_x), (dilation_y, dilation_x) = geometry.kernel_size, geometry.dilation
    (above, below), (before, after) = geometry.padding
    out_y, out_x = geometry.output_size((height + above + below, width + before + after))
    if geometry.padding_mode != "zeros":
        height, width, above, before = height + above + below, width + before + after, 0, 0
    offsets = [(y, x) for y in range(kernel_y) for x in range(kernel_x)]
    blocks: dict[Box, list[tuple[int, int, int]]] = {}
    for a, (ay, ax) in enumerate(offsets):
        for b, (by, bx) in enumerate(offsets[a:], start=a):
            lag = ((by - ay) * dilation_y, (bx - ax) * dilation_x)
            rows, columns = _both_inside(lag[0], height), _both_inside(lag[1], width)
            window_rows = clip(ay * dilation_y - above, out_y, rows)
            window_columns = clip(ax * dilation_x - before, out_x, columns)
            pieces = [(rows, columns, 1)]
            pieces += [(strip, columns, -1) for strip in _outside(window_rows, rows)]
            pieces += [(window_rows, strip, -1) for strip in _outside(window_columns, columns)]
            for (top, bottom), (left, right), sign in pieces:
                if bottom > top and right > left:
                    blocks.setdefault(Box(top, bottom, left, right, lag), []).append((a, b, sign))
    return Plan(blocks)


def _both_inside(lag: int, size: int) -> tuple[int, int]:
    """The q for which q and q + lag are both inside [0, size)."""
    return max(0, -lag), max(max(0, -lag), min(size, size - lag))


def clip(start: int, length: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """[start, start + length) inside the bounds, possibly empty."""
    first = min(max(start, bounds[0]), bounds[1])
    return first, max(first, min(start + length, bounds[1]))


def _outside(window: tuple[int, int], bounds: tuple[int, int]) -> list[tuple[int, int]]:
    """The parts of the bounds before and after the window."""
    return [(bounds[0], window[0]), (window[1], bounds[1])]
