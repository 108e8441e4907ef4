"""A picture of a report: what was done to every layer, and what it costs in error."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fxprune.errors import DataError
from fxprune.plots.style import INK, STATUS, ZERO, add_title, figure, shortened
from fxprune.report import LayerReport, PruneReport

MANY = 60  # layers; with more of them rows are lower and not every one is named
LARGEST = 110  # rows that the height grows for
WORDS = 32  # Letters of a reason that there is room for beside the longest names.
DECADES = 1e-4  # errors below this part of the largest are drawn at the edge


def layer_sparsity_and_error(report: PruneReport, name: str = "") -> Figure:
    """One line a layer from top to bottom: on the left its zeros, or the MACs that factoring leaves it; on the right its error.

    The error is a dot on a logarithmic scale, which has no zero for a bar to start at.

    Args:
        report: what `compiled.report` is.
        name: the model, for the title.

    Raises:
        DataError: the report has no layers.
    """
    layers = [layer for layer in report.layers if layer.is_read]
    if not layers:
        raise DataError("the report lists no layers; there is nothing to draw")
    rows = range(len(layers))
    many = len(layers) > MANY
    height = 1.5 + (0.27 * len(layers) if not many else 0.27 * MANY + 0.06 * (min(len(layers), 3 * LARGEST) - MANY))
    with figure(height, 6.4) as picture:
        left, right = picture.subplots(1, 2, sharey=True, width_ratios=[1, 1.1])
        factored = any(layer.status in ("factored", "narrowed") for layer in layers)
        shares = [_macs_left(layer) if factored else 100 * layer.sparsity for layer in layers]
        colors = [STATUS[layer.status] for layer in layers]
        left.barh(rows, [100.0] * len(layers), color=ZERO, height=0.66)
        left.barh(rows, shares, color=colors, height=0.66)
        left.set_xlim(0, 100)
        left.set_xlabel("MACs left (%)" if factored else "zeros (%)")
        step = math.ceil(len(layers) / LARGEST) if many else 1
        named = list(rows)[::step]
        size = 10 if not many else 5.5
        left.set_yticks(named, [shortened(layers[row].name, 30) for row in named], size=size)
        left.set_ylim(len(layers) - 0.4, -0.6)
        dots = _errors(right, layers, colors, size)
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        done = "" if factored else f", {report.sparsity:.0%} zeros"
        add_title(picture, f"{name + ': ' if name else ''}{report.pattern}, {report.method}{done}")
        drawn = dots | {layer.status for layer, share in zip(layers, shares, strict=True) if share}
        there = [status for status in STATUS if status in drawn]  # No colour is explained that is not to be seen.
        handles = [left.barh([0], [0], color=STATUS[status]) for status in there]
        if there:
            picture.legend(handles, there, loc="outside lower center", ncols=len(there), frameon=False, labelcolor=INK)
        return picture


def _macs_left(layer: LayerReport) -> float:
    """Percent of a layer's MACs that its two factors take; 100 for a layer that was not factored."""
    before, after = layer.macs if len(layer.macs) == 2 else (0, 0)
    return 100 * after / before if before else 100.0


def _errors(axes: Axes, layers: Sequence[LayerReport], colors: Sequence[str], size: float) -> set[str]:
    """A dot for each error, and words where there is none to draw; the status of the layers that have a dot."""
    dots: set[str] = set()
    errors = [layer.relative_error for layer in layers]
    positive = [error for error in errors if error is not None and math.isfinite(error) and error > 0]
    low, high = (0.1, 1.0) if not positive else (max(min(positive), max(positive) * DECADES), max(positive))
    low, high = 10 ** (math.floor(math.log10(low) * 2) / 2), high * 1.6
    high = max(high, low * 20)  # two ticks at least
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high)
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("relative output error")
    for row, (layer, error, color) in enumerate(zip(layers, errors, colors, strict=True)):
        if error is not None and math.isfinite(error) and error >= low:
            axes.plot([low / 1.3, error], [row, row], color=ZERO, linewidth=min(1.2, size / 8), zorder=1)
            dots.add(layer.status)
            axes.plot([error], [row], "o", color=color, markersize=min(6.5, size * 0.65), zorder=2)
            continue
        if error is None:
            words = textwrap.shorten(layer.reason, WORDS, placeholder="…") if layer.status != "factored" else ""
        elif error == 0:
            words = "0 (nothing before it has changed)" if layer.status == "reconstructed" else "0"
        else:
            words = f"{error:.0e}" if math.isfinite(error) else "not finite"
        axes.annotate(
            words or "not measured", (0, row), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", size=min(8.5, size), color=INK, annotation_clip=False,
        )  # fmt: skip
    return dots
