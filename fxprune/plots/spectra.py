"""Singular values of layers' weights: how many directions a layer uses, dense and pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fxprune.errors import DataError
from fxprune.geometry import flatten_weight
from fxprune.plots.style import FAINT, INK, add_title, figure, shortened

COLUMNS = 2
ENERGY = 0.9
DENSE, PRUNED = "#7F7F7F", "#0072B2"
WIDE, NARROW = 6.0, 1.8  # of the lines: where both curves are one, the dense one shows on both sides of the other


def singular_values(weight: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Singular values of a weight (R, C, *kernel) seen as the matrix R x (kernel positions, C), largest first."""
    values: np.ndarray[tuple[int], np.dtype[np.float64]] = torch.linalg.svdvals(
        flatten_weight(weight.detach().cpu().double())
    ).numpy()
    return values


def energy_rank(values: np.ndarray[tuple[int], np.dtype[np.float64]], energy: float = ENERGY) -> int:
    """How many singular values hold this share of the sum of squares."""
    share = np.cumsum(values**2) / max(float(np.sum(values**2)), 1e-300)
    return int(np.searchsorted(share, energy - 1e-12) + 1)


def singular_value_spectra(
    weights: Mapping[str, Tensor], dense: Mapping[str, Tensor] | None = None, name: str = ""
) -> Figure:
    """One panel a layer: singular values over their rank, and the rank that holds 90% of the energy.

    Args:
        weights: weights (R, C, *kernel) or (R, C) by layer name.
        dense: the same layers before pruning; drawn in grey behind. Layers that it lacks are drawn alone.
        name: the model, for the title.

    Raises:
        DataError: there is no layer.
    """
    if not weights:
        raise DataError("no layer is chosen; there is nothing to draw")
    lines = math.ceil(len(weights) / COLUMNS)
    columns = min(COLUMNS, len(weights))
    with figure(0.9 + 2.0 * lines, 6.4) as picture:
        grid = picture.subplots(lines, columns, squeeze=False)
        panels = list(grid.flat)
        for axes, (layer, weight) in zip(panels, weights.items(), strict=False):
            before = None if dense is None or layer not in dense else singular_values(dense[layer])
            _panel(axes, singular_values(weight), before)
            axes.set_title(shortened(layer, 34), size=11)
        for axes in panels[len(weights) :]:
            axes.set_axis_off()
        for axes in panels[max(0, len(weights) - columns) : len(weights)]:
            axes.set_xlabel("rank")
        picture.supylabel("singular value", size=12)
        what = "dense (grey, wide) and pruned (blue)" if dense else "singular values"
        add_title(picture, f"{name + ': ' if name else ''}{what}")
        picture.supxlabel(
            f"tick, and numbers: so many singular values hold {ENERGY:.0%} of the energy", size=10, color=INK
        )
        return picture


def _panel(
    axes: Axes,
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
    before: np.ndarray[tuple[int], np.dtype[np.float64]] | None,
) -> None:
    written = 0
    for curve, color in ((before, DENSE), (values, PRUNED)):
        if curve is None:
            continue
        is_dense = color == DENSE
        width, alpha = (WIDE, 0.45) if is_dense else (NARROW, 1.0)
        axes.plot(np.arange(1, len(curve) + 1), curve, color=color, linewidth=width, alpha=alpha)
        rank = energy_rank(curve)
        axes.plot(
            [rank], [curve[rank - 1]], marker="|", markersize=24 if is_dense else 13, markeredgewidth=2.2, color=color
        )
        axes.annotate(
            f"{rank} of {len(curve)}", (1, 1), xycoords="axes fraction", xytext=(0, -7 - 15 * written),
            textcoords="offset points", ha="right", va="top", color=color, size=11,
        )  # fmt: skip
        written += 1
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.spines["left"].set_color(FAINT)
