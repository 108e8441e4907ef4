"""Weights as small pictures and histograms, for the page that `GraphDiff.to_html` writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.geometry import flatten_weight
from fxprune.graph_diff.weights import Weights

CORNER = (32, 144)  # rows and columns of a weight that are shown one by one
OVERVIEW = (64, 144)  # cells at most of the picture of a whole weight
BINS = 49


@dataclass(frozen=True)
class Histogram:
    """Counts of the non-zero weights in equal bins over [-limit, limit], and of the zeros."""

    limit: float
    counts: tuple[int, ...]
    zeros: int


@dataclass(frozen=True)
class WeightPicture:
    """A weight as a matrix: rows are output channels, columns (kernel position, input channel), channels innermost.

    Attributes:
        shape: (rows, columns) of the whole matrix.
        channels: columns at each kernel position.
        corner_shape: (rows, columns) of the upper left corner, which is the whole of a small weight.
        limit: the largest absolute weight in either corner.
        corner_before: int8 per weight of the corner, 127 for `limit`; 0 stands for zero and for nothing else.
        corner_after: likewise; None on the side where there is no such layer.
        overview_shape: (rows, columns) of the overview, or (0, 0) if the corner is everything.
        overview_cell: (rows, columns) of the weight that one cell of the overview stands for.
        overview_before: uint8 per cell: 255 times the share of weights that are not zero.
        overview_after: likewise.
        histogram_before: of all weights.
        histogram_after: likewise.
    """

    shape: tuple[int, int]
    channels: int
    corner_shape: tuple[int, int]
    limit: float
    corner_before: bytes | None
    corner_after: bytes | None
    overview_shape: tuple[int, int]
    overview_cell: tuple[int, int]
    overview_before: bytes | None
    overview_after: bytes | None
    histogram_before: Histogram | None
    histogram_after: Histogram | None


def draw_weights(before: Weights | None, after: Weights | None) -> WeightPicture | None:
    """Draw a layer's weight before and after, or the one that there is; None if there is none.

    If the shapes differ only the weight after is drawn.
    """
    old, new = _finite_weight(before), _finite_weight(after)
    if old is not None and new is not None and old.shape != new.shape:
        old = None
    both = (old, new)
    some = new if new is not None else old
    if some is None:
        return None
    rows, columns = some.shape[0], some[0].numel()
    corner = (min(rows, CORNER[0]), min(columns, CORNER[1]))
    corners = [None if w is None else flatten_weight(w[: corner[0]])[:, : corner[1]] for w in both]
    corner_limit = max(float(c.abs().max()) for c in corners if c is not None)
    limit = max(float(w.abs().max()) for w in both if w is not None)
    block = (-(-rows // OVERVIEW[0]), 4 * -(-columns // (4 * OVERVIEW[1])))  # whole groups of 4: 2:4 must look even
    overview = (0, 0) if corner == (rows, columns) else (-(-rows // block[0]), -(-columns // block[1]))
    quantised = [None if c is None else _quantise(c, corner_limit) for c in corners]
    histograms = [None if w is None else _histogram(w, limit) for w in both]
    shares = [None if w is None or overview == (0, 0) else _kept_share(w, overview, block) for w in both]
    return WeightPicture(
        shape=(rows, columns),
        channels=some.shape[1],
        corner_shape=corner,
        limit=corner_limit,
        corner_before=quantised[0],
        corner_after=quantised[1],
        overview_shape=overview,
        overview_cell=block,
        overview_before=shares[0],
        overview_after=shares[1],
        histogram_before=histograms[0],
        histogram_after=histograms[1],
    )


def _finite_weight(weights: Weights | None) -> Tensor | None:
    """The weight in float32 if it has two dimensions or more and is not empty; what is not finite counts as zero."""
    if weights is None or weights.weight is None or weights.weight.dim() < 2 or not weights.weight.numel():
        return None
    weight = weights.weight.float()
    return weight if torch.isfinite(weight.sum()) else weight.nan_to_num(0.0, 0.0, 0.0)


def _quantise(corner: Tensor, limit: float) -> bytes:
    levels = (corner / (limit or 1.0) * 127).round()
    levels = torch.where((levels == 0) & (corner != 0), corner.sign(), levels)
    return levels.to(torch.int8).numpy().tobytes()


def _kept_share(weight: Tensor, cells: tuple[int, int], block: tuple[int, int]) -> bytes:
    if bool(weight.all()):
        return bytes([255]) * (cells[0] * cells[1])
    share = F.avg_pool2d(flatten_weight(weight != 0).float()[None, None], block, ceil_mode=True)
    return (share * 255).round().to(torch.uint8).numpy().tobytes()


def _histogram(weight: Tensor, limit: float) -> Histogram:
    counts = torch.histc(weight, BINS, -limit, limit).long() if limit else torch.zeros(BINS, dtype=torch.long)
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    counts[BINS // 2] -= zeros if limit else 0  # BINS is odd: zero lies in the middle one
    return Histogram(limit, tuple(counts.tolist()), zeros)
