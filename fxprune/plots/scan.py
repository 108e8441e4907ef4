"""A picture of a scan: what each layer alone costs at the model's output, under each recipe."""

from __future__ import annotations

import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fxprune.errors import DataError
from fxprune.plots.layers import LARGEST, MANY
from fxprune.plots.style import INK, RECIPES, ZERO, Mark, add_title, figure, shortened
from fxprune.scanning import Scan

DECADES = 1e-7  # costs below this part of the largest are drawn at the edge


def costs_at_the_output(scan: Scan, name: str = "") -> Figure:
    """One line a layer from top to bottom, a dot a recipe on a logarithmic scale; a layer that keeps none says why.

    Args:
        scan: what `fxprune.scan` returned.
        name: the model, for the title.

    Raises:
        DataError: there is no layer, or none that can keep any recipe.
    """
    layers = list(dict.fromkeys(row.name for row in scan.layers))
    found = [row.cost for row in scan.layers if math.isfinite(row.cost) and row.cost > 0]
    if not found:
        raise DataError("no layer costs anything under these recipes; there is nothing to draw")
    low = 10 ** math.floor(math.log10(max(min(found), max(found) * DECADES)))
    many = len(layers) > MANY
    height = 1.6 + (0.27 * len(layers) if not many else 0.27 * MANY + 0.06 * (min(len(layers), 3 * LARGEST) - MANY))
    size = 10 if not many else 5.5
    marks = {recipe: RECIPES[place % len(RECIPES)] for place, recipe in enumerate(scan.recipes)}
    with figure(height, 6.4) as picture:
        axes = picture.subplots()
        axes.set_xscale("log")
        axes.set_xlim(low / 1.6, max(max(found) * 1.6, low * 20))
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("relative error of the model's output with this layer alone compressed")
        for row, layer in enumerate(layers):
            _line(axes, row, layer, scan, marks, low, size)
        step = math.ceil(len(layers) / LARGEST) if many else 1
        named = range(0, len(layers), step)
        axes.set_yticks(named, [shortened(layers[row], 30) for row in named], size=size)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        handles = [axes.plot([], [], mark.marker, color=mark.color)[0] for mark in marks.values()]
        picture.legend(
            handles, list(marks), loc="outside lower center", ncols=min(len(marks), 4), frameon=False, labelcolor=INK
        )
        add_title(picture, f"{name + ': ' if name else ''}what each layer costs")
        return picture


def _line(axes: Axes, row: int, layer: str, scan: Scan, marks: dict[str, Mark], low: float, size: float) -> None:
    """The dots of a layer, joined from the cheapest to the dearest; words where there is none."""
    costs = {of.recipe: of.cost for of in scan.layers if of.name == layer and math.isfinite(of.cost)}
    if not costs:
        reason = next(of.reason for of in scan.layers if of.name == layer)
        axes.annotate(
            textwrap.shorten(reason, 60, placeholder="…"), (0, row), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", size=min(8.5, size), color=INK, annotation_clip=False,
        )  # fmt: skip
        return
    places = {recipe: max(cost, low) for recipe, cost in costs.items()}
    axes.plot([min(places.values()), max(places.values())], [row, row], color=ZERO, linewidth=2, zorder=1)
    for recipe, place in places.items():
        mark = marks[recipe]
        axes.plot(
            [place], [row], mark.marker, color=mark.color, markersize=min(6.5, size * 0.65), zorder=2, clip_on=False
        )
