"""Pictures of a benchmark's rows: accuracy against sparsity, and methods side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fxprune.errors import DataError
from fxprune.experiments.grid_rows import OK, Row
from fxprune.plots.style import FAINT, INK, add_title, figure, label_ends, mark

N_OF_M, UNSTRUCTURED = PANELS = ("N:M along input channels", "unstructured")
LONGEST = 44  # letters of a recipe's in a title
SIDE_BY_SIDE = 3.0  # percent of zeros between two patterns whose names would touch


@dataclass(frozen=True)
class Point:
    """All seeds of one model, pattern and method: sparsity and accuracy in percent.

    Attributes:
        label: the method, with what else tells it apart from others in the same picture.
        method: the method alone.
        pattern: as asked for.
        sparsity: mean share of zeros.
        accuracy: mean.
        deviation: standard deviation over seeds, 0 for a single one.
        seeds: how many.
        dense: accuracy of the dense model.
    """

    label: str
    method: str
    pattern: str
    sparsity: float
    accuracy: float
    deviation: float
    seeds: int
    dense: float


def points(rows: Sequence[Row], name: str) -> list[Point]:
    """Finished rows of one model, seeds taken together, in the order of the rows.

    Raises:
        DataError: there is none.
    """
    chosen = [row for row in rows if row.name == name and row.status == OK]
    if not chosen:
        raise DataError(
            f"no finished row is of model {name!r}; there are {', '.join({row.name for row in rows}) or 'none'}"
        )
    several = len({row.calibration_images for row in chosen}) > 1
    settings = {row.settings for row in chosen}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in chosen:
        label = row.method + (f", {row.calibration_images} images" if several else "")
        label += f", {row.settings}" if len(settings) > 1 and row.settings != "{}" else ""
        groups.setdefault((label, row.method, row.pattern), []).append(row)
    return [
        Point(
            label=label,
            method=method,
            pattern=pattern,
            sparsity=100 * _mean([row.sparsity for row in group]),
            accuracy=_mean([row.accuracy for row in group]),
            deviation=_deviation([row.accuracy for row in group]),
            seeds=len(group),
            dense=_mean([row.dense_accuracy for row in group]),
        )
        for (label, method, pattern), group in groups.items()
    ]


def accuracy_against_sparsity(rows: Sequence[Row], name: str) -> Figure:
    """One line a method; N:M patterns and unstructured sparsity in panels of their own where there are both.

    Recipes of other kinds, such as "rank:0.7", have no place on this axis and are left out.

    Args:
        rows: of a benchmark's CSV.
        name: the model's label there.

    Raises:
        DataError: no finished row of that model has one pattern for all layers.
    """
    found = [point for point in points(rows, name) if has_level(point.pattern)]
    if not found:
        raise DataError(f"no row of {name!r} has an N:M pattern or a sparsity for all layers; draw `method_comparison`")
    panels = [
        (title, group) for title in PANELS if (group := [point for point in found if _panel(point.pattern) == title])
    ]
    with figure(1.0 + 3.2 * len(panels)) as picture:
        grid = picture.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)
        low, high = min(p.sparsity for p in found), max(p.sparsity for p in found)
        room = max(high - low, 5.0)
        for axes, (title, group) in zip(grid[:, 0], panels, strict=True):
            axes.set_xlim(low - 0.1 * room, high + 0.06 * room)
            axes.margins(y=0.14)
            ends = _lines(axes, group, [p.method for p in found])
            axes.axhline(found[0].dense, color=INK, linewidth=1.2, linestyle=":")
            ends.append((high + 0.06 * room, found[0].dense, f"dense {found[0].dense:.1f}%", INK))
            axes.autoscale_view(scalex=False)
            _name_patterns(axes, group)
            label_ends(axes, ends)
            axes.set_ylabel("accuracy (%)")
            if len(panels) > 1:
                axes.set_title(title, size=12)
        grid[-1, 0].set_xlabel("zeros among the weights of all layers (%)")
        add_title(picture, f"{name}: one-shot, no retraining")
        _note_seeds(picture, found)
        return picture


def has_level(recipe: str) -> bool:
    """Whether a recipe is one pattern for all layers, so that its share of zeros says how much it asks for."""
    return _panel(recipe) is not None


def _panel(recipe: str) -> str | None:
    if re.fullmatch(r"\d+:\d+|mixed:[\d.]+", recipe):
        return N_OF_M
    return UNSTRUCTURED if re.fullmatch(r"[\d.]+", recipe) else None


def _lines(axes: Axes, group: Sequence[Point], methods: Sequence[str]) -> list[tuple[float, float, str, str]]:
    """Draw one line a label; returns where each ends, its label and its colour."""
    ends = []
    for label in dict.fromkeys(point.label for point in group):
        line = sorted((point for point in group if point.label == label), key=lambda point: point.sparsity)
        style = mark(line[0].method, methods)
        axes.errorbar(
            [p.sparsity for p in line], [p.accuracy for p in line], [p.deviation for p in line],
            color=style.color, marker=style.marker,
        )  # fmt: skip
        ends.append((line[-1].sparsity, line[-1].accuracy, label, style.color))
    return ends


def _name_patterns(axes: Axes, found: Sequence[Point]) -> None:
    """Write 2:4 and the like along the bottom, under their points; those with the same share of zeros side by side."""
    places: dict[str, list[float]] = {}
    for point in found:
        if _panel(point.pattern) == N_OF_M:
            places.setdefault(point.pattern, []).append(point.sparsity)
    together: list[tuple[float, list[str]]] = []
    for pattern, sparsity in sorted(((name, _mean(some)) for name, some in places.items()), key=lambda pair: pair[1]):
        if together and sparsity - together[-1][0] < SIDE_BY_SIDE:
            together[-1][1].append(pattern)
        else:
            together.append((sparsity, [pattern]))
    for sparsity, names in together:
        axes.annotate(
            ", ".join(names), (sparsity, 0), xycoords=("data", "axes fraction"), xytext=(0, 5),
            textcoords="offset points", ha="center", va="bottom", color=FAINT, size=11,
        )  # fmt: skip


def method_comparison(rows: Sequence[Row], name: str) -> Figure:
    """For each pattern, how far each method falls below the dense model.

    Args:
        rows: of a benchmark's CSV.
        name: the model's label there.

    Raises:
        DataError: no finished row is of that model.
    """
    found = points(rows, name)
    patterns = list(dict.fromkeys(point.pattern for point in found))
    heights = [sum(p.pattern == pattern for p in found) for pattern in patterns]
    with figure(1.0 + 0.42 * sum(heights) + 0.5 * len(patterns)) as picture:
        panels = picture.subplots(
            len(patterns), 1, squeeze=False, sharex=True, height_ratios=[h + 0.6 for h in heights]
        )
        for axes, pattern in zip(panels[:, 0], patterns, strict=True):
            group = sorted((p for p in found if p.pattern == pattern), key=lambda p: p.accuracy)
            for y, point in enumerate(group):
                style = mark(point.method, [p.method for p in found])
                axes.plot([point.accuracy, point.dense], [y, y], color=style.color, linewidth=2.2, alpha=0.35)
                axes.errorbar(
                    point.accuracy,
                    y,
                    xerr=point.deviation or None,
                    color=style.color,
                    marker=style.marker,
                    markersize=9,
                )
                lost = round(point.accuracy - point.dense, 1) + 0.0  # + 0.0: no "-0.0"
                text = f"{point.accuracy:.1f} ({lost:+.1f})".replace("-", "−")
                axes.annotate(
                    text, (1.0, y), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
                    va="center", color=style.color, annotation_clip=False,
                )  # fmt: skip
            axes.axvline(group[0].dense, color=INK, linewidth=1.2, linestyle=":")
            axes.set_yticks(range(len(group)), [p.label for p in group])
            axes.set_ylim(-0.6, len(group) - 0.4)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            zeros = f"{_mean([p.sparsity for p in group]):.0f}%"
            named = _panel(pattern) != UNSTRUCTURED
            short = pattern if len(pattern) <= LONGEST else f"{pattern[:LONGEST]}…"
            axes.set_title(f"{short}  ({zeros} zeros)" if named else f"unstructured, {zeros} zeros", size=12)
        panels[-1, 0].set_xlabel(f"accuracy (%); the dotted line is dense, {found[0].dense:.1f}%")
        add_title(picture, f"{name}: accuracy, and points lost")
        _note_seeds(picture, found)
        return picture


def _note_seeds(picture: Figure, found: Sequence[Point]) -> None:
    seeds = sorted({point.seeds for point in found})
    if seeds != [1]:
        several = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        picture.supxlabel(f"bars: standard deviation over {several} calibration seeds", size=10, color=INK)


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _deviation(values: Sequence[float | None]) -> float:
    found = [value for value in values if value is not None]
    return float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
