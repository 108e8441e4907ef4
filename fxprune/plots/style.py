"""How every picture looks: sizes that can be read on a phone and in print, colours that the colour-blind can tell apart."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from fxprune.errors import OptionsError
from fxprune.files import atomic

WIDTH = 5.6  # inches: a column in print, and a phone's width at about half the size
INK, FAINT, ZERO = "#333333", "#9a9a9a", "#e8e8e8"
FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Mark:
    """Colour and shape of one method; the shape tells them apart where colour cannot."""

    color: str
    marker: str


# Okabe and Ito's colours, without the yellow that white paper swallows.
METHODS = {
    "admm": Mark("#0072B2", "o"),
    "sparsegpt": Mark("#D55E00", "s"),
    "exact_obs": Mark("#009E73", "^"),
    "magnitude": Mark("#7F7F7F", "D"),
}
# Four colours and five shapes for methods of the user's own: twenty that look different.
_OTHER_COLORS, _OTHER_SHAPES = ("#CC79A7", "#56B4E9", "#E69F00", "#000000"), ("v", "P", "X", "*", "<")
# Recipes have no colour of their own: these in their order.
RECIPES = (*METHODS.values(), *map(Mark, _OTHER_COLORS, _OTHER_SHAPES))
STATUS = {
    "pruned": "#0072B2",
    "factored": "#009E73",
    "narrowed": "#CC79A7",
    "reconstructed": "#56B4E9",
    "kept": "#B0B0B0",
    "unread": "#E0E0E0",
}

_RC: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "errorbar.capsize": 4,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "fxprune",  # the same picture is the same file
}


def mark(name: str, names: Sequence[str]) -> Mark:
    """The mark of a method; methods of the user's own take the others in the order of `names`."""
    if name in METHODS:
        return METHODS[name]
    place = list(dict.fromkeys(other for other in names if other not in METHODS)).index(name)
    return Mark(_OTHER_COLORS[place % len(_OTHER_COLORS)], _OTHER_SHAPES[place % len(_OTHER_SHAPES)])


def shortened(name: str, length: int) -> str:
    """A layer's name in at most `length` letters: words are cut, those with numbers after others, the last one at last.

    >>> shortened("backbone.features.stage3.depthwise.conv", 30)
    'ba….fe….stage3.depthwise.conv'
    >>> shortened("encoder.layers.encoder_layer_0.self_attention.q_proj", 30)
    'en….la….en…0.se….q_proj'
    """
    parts = name.split(".")
    last = len(parts) - 1
    for place in sorted(range(len(parts)), key=lambda i: (i == last, any(map(str.isdigit, parts[i])), i)):
        if len(".".join(parts)) > length and len(parts[place]) > 3:
            number = re.search(r"\d*$", parts[place])
            parts[place] = f"{parts[place][:2]}…{number[0] if number else ''}"
    name = ".".join(parts)
    return name if len(name) <= length else f"…{name[-(length - 1) :]}"


def add_title(picture: Figure, text: str) -> None:
    """Write the picture's title at its upper left, on several lines where one is too long."""
    size = 13
    letters = int(picture.get_size_inches()[0] * 72 / (size * 0.62))
    picture.suptitle(textwrap.fill(text, letters), x=0.02, ha="left", weight="bold", size=size)


@contextmanager
def figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """Yield an empty figure of a size in inches, under this module's style."""
    with mpl.rc_context(_RC):
        yield Figure(figsize=(width, height))


def save_figure(picture: Figure, stem: Path, formats: Sequence[str] = ("png", "svg"), *, dpi: int = 200) -> list[Path]:
    """Write a figure to one file a format, each whole or not at all.

    Args:
        picture: the figure.
        stem: path without the suffix.
        formats: of `FORMATS`.
        dpi: dots per inch of a png.

    Returns:
        The files.

    Raises:
        OptionsError: an unknown format.
    """
    files = []
    for kind in formats:
        if kind not in FORMATS:
            raise OptionsError(f"unknown picture format {kind!r}; choose of {', '.join(FORMATS)}")
        path = stem.with_name(f"{stem.name}.{kind}")
        with mpl.rc_context(_RC), atomic(path) as part:
            picture.savefig(part, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
        files.append(path)
    return files


def label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]], *, size: float = 12) -> None:
    """Write labels (x, y, text, colour) to the right of points, moved apart vertically where they would overlap.

    Call it once the axes have their final limits; room to the right is the caller's affair.
    """
    if not labels:
        return
    low, high = axes.transData.inverted().transform(axes.transAxes.transform([(0, 0), (0, 1)]))[:, 1]
    # One line of text in data units, from the height that the axes will have at most.
    root = axes.get_figure(root=True)
    assert root is not None
    inches = root.get_size_inches()[1] * 0.8
    line = (high - low) * size * 1.25 / 72 / inches
    for (x, y, text, color), place in zip(labels, spread([y for _, y, _, _ in labels], line), strict=True):
        axes.annotate(
            text, (x, y), xytext=(12, (place - y) / line * size * 1.25), textcoords="offset points",
            color=color, size=size, va="center", ha="left", annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 0, "shrinkB": 5},
        )  # fmt: skip


def spread(places: Sequence[float], distance: float) -> list[float]:
    """Places moved as little as need be, so that any two are at least `distance` apart; their order is kept.

    >>> spread([1.0, 1.0, 5.0], 1.0)
    [0.5, 1.5, 5.0]
    """
    order = np.argsort(places, kind="stable")
    # Runs of labels that touch are merged and centred on the mean of where they want to be.
    runs: list[list[int]] = []
    for index in order:
        runs.append([int(index)])
        while len(runs) > 1 and _overlap(runs[-2], runs[-1], places, distance):
            last = runs.pop()
            runs[-1] += last
    result = [0.0] * len(places)
    for run in runs:
        for number, index in enumerate(run):
            result[index] = _centre(run, places) + distance * (number - (len(run) - 1) / 2)
    return result


def _overlap(lower: Sequence[int], upper: Sequence[int], places: Sequence[float], distance: float) -> bool:
    room = _centre(upper, places) - _centre(lower, places)
    return room < distance * (len(lower) + len(upper)) / 2


def _centre(run: Sequence[int], places: Sequence[float]) -> float:
    return float(np.mean([places[index] for index in run]))
