"""A picture of a report: every layer's zeros and error."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fxprune.errors import DataError
from fxprune.plots.style import INK, STATUS, ZERO, figure
from fxprune.report import PruneReport


def layer_sparsity_and_error(report: PruneReport, name: str = "") -> Figure:
    """One line a layer: a bar for its zeros, a bar for its output error on a logarithmic scale, layers from top to bottom.

    Args:
        report: what `compiled.report` is.
        name: the model, for the title.

    Raises:
        DataError: the report has no layers.
    """
    layers = report.layers
    if not layers:
        raise DataError("the report lists no layers; there is nothing to draw")
    errors = [layer.relative_error for layer in layers if layer.relative_error]
    rows = range(len(layers))
    with figure(1.3 + 0.27 * len(layers), 6.4) as picture:
        zeros, error = picture.subplots(1, 2, sharey=True, width_ratios=[1, 1.1])
        colors = [STATUS[layer.status] for layer in layers]
        zeros.barh(rows, [100.0] * len(layers), color=ZERO, height=0.66)
        zeros.barh(rows, [100 * layer.sparsity for layer in layers], color=colors, height=0.66)
        zeros.set_xlim(0, 100)
        zeros.set_xlabel("zeros (%)")
        zeros.set_yticks(rows, [layer.name for layer in layers], size=10)
        zeros.set_ylim(len(layers) - 0.4, -0.6)
        if errors:
            # A layer that is all but exact must not squeeze the others together: about four decades are shown.
            low = 10.0 ** math.floor(math.log10(min(max(min(errors), max(errors) * 1e-3), max(errors) * 0.05)))
            ends = [max(layer.relative_error or low, low) for layer in layers]
            error.barh(rows, [end - low for end in ends], left=low, color=colors, height=0.66)
            error.set_xscale("log")
            error.xaxis.set_minor_formatter(NullFormatter())
            error.set_xlim(low, max(errors) * 2)
        error.set_xlabel("error of the output, relative")
        for y, layer in enumerate(layers):
            value = layer.relative_error
            if value is None or (errors and value < low):
                text = f"{value:.0e}" if value is not None else _short(layer.reason) or "not measured"
                error.annotate(
                    text, (0, y), xycoords=("axes fraction", "data"), xytext=(4, 0),
                    textcoords="offset points", va="center", size=9.5, color=INK,
                )  # fmt: skip
        for axes in (zeros, error):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        title = f"{name + ': ' if name else ''}{report.pattern}, {report.method}, {report.sparsity:.0%} zeros"
        picture.suptitle(title, x=0.02, ha="left", weight="bold", size=13)
        there = [status for status in STATUS if any(layer.status == status for layer in layers)]
        handles = [zeros.barh([0], [0], color=STATUS[status]) for status in there]
        picture.legend(handles, there, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
        return picture


def _short(reason: str) -> str:
    return reason if len(reason) <= 40 else reason[:39].rstrip() + "…"
