"""Pictures of masks: a corner of each layer's weight matrix, zeros left white."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from fxprune.errors import DataError
from fxprune.geometry import flatten_weight
from fxprune.plots.style import FAINT, INK, add_title, figure, shortened

ROWS, COLUMNS = 16, 48
# Blue and orange differ for every kind of colour vision, and both are darker than the white of a zero.
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#B34700", "#FFE9D9", "#DCEBF7", "#004C80"])


def mask_pictures(weights: Mapping[str, Tensor], name: str = "", group: int | Mapping[str, int] = 4) -> Figure:
    """The first 16 output channels and 48 columns of each layer; columns are (kernel position, input channel).

    A zero is white, a positive weight blue, a negative one orange, the darker the larger. Lines part the groups of an N:M
    pattern; kernel positions follow one another with their input channels side by side.

    Args:
        weights: weights (R, C, *kernel) or (R, C) by layer name.
        name: the model, for the title.
        group: columns between two lines, 0 for none; one for all layers, or one each.

    Raises:
        DataError: there is no layer.
    """
    if not weights:
        raise DataError("no layer is chosen; there is nothing to draw")
    groups = group if isinstance(group, Mapping) else dict.fromkeys(weights, group)
    with figure(1.0 + 2.35 * len(weights), 6.4) as picture:
        panels = picture.subplots(len(weights), 1, squeeze=False)[:, 0]
        for axes, (layer, weight) in zip(panels, weights.items(), strict=True):
            matrix = flatten_weight(weight.detach().cpu().double())
            corner = matrix[:ROWS, :COLUMNS].numpy()
            axes.imshow(
                np.ma.masked_equal(_shades(corner), 0),
                cmap=_SIGNED,
                vmin=-1,
                vmax=1,
                aspect="auto",
                interpolation="none",
            )
            height, width = corner.shape
            axes.set_xticks([]), axes.set_yticks([])
            axes.grid(visible=False)
            for side in axes.spines.values():
                side.set_visible(True)
            thin = [[(x - 0.5, -0.5), (x - 0.5, height - 0.5)] for x in range(1, width)]
            thin += [[(-0.5, y - 0.5), (width - 0.5, y - 0.5)] for y in range(1, height)]
            axes.add_collection(LineCollection(thin, colors="#eeeeee", linewidths=0.4))
            step = groups[layer]
            if step and weight.shape[1] % step == 0:
                lines = [[(x - 0.5, -0.5), (x - 0.5, height - 0.5)] for x in range(step, width, step)]
                axes.add_collection(LineCollection(lines, colors=FAINT, linewidths=1.0))
            zeros = float((weight == 0).double().mean())
            axes.set_title(
                f"{shortened(layer, 40)}: {zeros:.0%} zeros of {matrix.shape[0]} × {matrix.shape[1]}", size=12
            )
            axes.set_ylabel("output channel", size=11)
        panels[-1].set_xlabel("input channels, kernel position after kernel position", size=11)
        add_title(picture, f"{name + ': ' if name else ''}which weights are left")
        sizes = " or ".join(map(str, sorted({step for step in groups.values() if step})))
        note = (
            f"top left corner; white: zero, blue: positive, orange: negative{sizes and f'; lines: groups of {sizes}'}"
        )
        picture.supxlabel(note, size=10, color=INK)
        return picture


def _shades(
    corner: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Weights as shades in [-1, 1]: 0 stays 0, others keep their sign and go from 0.35 to 1 by magnitude."""
    largest = float(np.abs(corner).max()) or 1.0
    shade = 0.35 + 0.65 * np.sqrt(np.abs(corner) / largest)
    return np.where(corner == 0, 0.0, np.sign(corner) * shade)
