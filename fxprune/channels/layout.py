"""Channel classes: which channels of which tensors are one and the same, and which of them may change places.

Every tensor of a graph gets a `Layout`, one class a channel. Channels that an operation ties together, such as those an
add puts on top of each other, are of one class. Two classes may change places everywhere at once if they occur equally
often in every tensor and nothing fixes either: that leaves each tensor with the same classes in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.fx import Node

Classes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The channel classes of one tensor.

    Attributes:
        dim: the channel dimension, counted from the front.
        classes: (C,) class of each channel.
    """

    dim: int
    classes: Classes


@dataclass(frozen=True)
class Channels:
    """What the analysis of a graph found.

    Attributes:
        layouts: of every node whose value is a tensor with channels.
        atoms: sets of at least two classes that may be permuted among themselves, each in increasing order.
        reasons: why a class is fixed.
        count: number of classes; they are numbered from 0.
    """

    layouts: dict[Node, Layout]
    atoms: tuple[Classes, ...]
    reasons: dict[int, str]
    count: int

    def reason(self, node: Node) -> str:
        """Why no two channels of a node's value may change places."""
        classes = self.layouts[node].classes if node in self.layouts else ()
        reasons = [self.reasons[c] for c in map(int, classes) if c in self.reasons]
        return reasons[0] if reasons else "no two of them are read by the same layers"


class Relations:
    """Collects what a walk over the graph finds out about channel classes; `solve` draws the conclusions."""

    def __init__(self) -> None:
        self._count = 0
        self._ties: list[tuple[Classes, Classes]] = []
        self._fixed: list[tuple[Classes, str]] = []
        self._parts: list[Classes] = []
        self._pads: list[tuple[Classes, Classes, Classes]] = []

    def new(self, count: int) -> Classes:
        """Classes that have not been seen before, (count,)."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def tie(self, a: Classes, b: Classes) -> None:
        """Position by position, the classes are one and the same."""
        self._ties.append((a, b))

    def fix(self, classes: Classes, reason: str) -> None:
        """These classes must stay where they are."""
        self._fixed.append((classes, reason))

    def divide(self, *parts: Classes) -> None:
        """Channels of different parts must not change places."""
        self._parts.extend(parts)

    def pad(self, before: Classes, inner: Classes, after: Classes) -> None:
        """`before` and `after` are constant channels around `inner`, all with one value."""
        self._pads.append((before, inner, after))

    def solve(self, layouts: dict[Node, Layout]) -> Channels:
        """Tied classes become one class, named by its smallest member; the rest follows."""
        names = _components(self._count, self._ties)
        reasons: dict[int, str] = {}
        for classes, reason in self._fixed:
            for c in names[classes].tolist():
                reasons.setdefault(c, reason)
        renamed = {node: Layout(layout.dim, names[layout.classes]) for node, layout in layouts.items()}
        tensors = [layout.classes for layout in renamed.values()]
        tensors += [names[part] for part in self._parts]
        for before, inner, after in ([names[part] for part in pad] for pad in self._pads):
            # Constants before and after are alike, unless one of them is tied to a channel between: then the second
            # occurrence of a class may be the constant in one case and the channel in the other.
            constants = np.concatenate([before, after])
            apart = np.intersect1d(constants, inner).size > 0
            tensors += [before, after] if apart else [constants]
            tensors.append(inner)
        return Channels(renamed, tuple(_atoms(tensors, reasons)), reasons, self._count)


def new_places(classes: Classes, source: Classes) -> Classes:
    """Where each channel of a tensor comes from, (C,), when class c is replaced by class `source[c]` everywhere.

    The k-th occurrence of a class is replaced by the k-th occurrence of the other.
    """
    moved = np.empty_like(classes)
    moved[np.argsort(source[classes], kind="stable")] = np.argsort(classes, kind="stable")
    return moved


def _components(count: int, ties: list[tuple[Classes, Classes]]) -> Classes:
    """The smallest class tied to each class, directly or through others, (count,)."""
    names = np.arange(count)
    if not ties:
        return names
    a, b = (np.concatenate(side) for side in zip(*ties, strict=True))
    while True:
        smaller = np.minimum(names[a], names[b])
        before = names.copy()
        for end in (a, b):
            np.minimum.at(names, before[end], smaller)
            np.minimum.at(names, end, smaller)
        names = names[names]
        if np.array_equal(names, before):
            return names


def _atoms(tensors: Iterable[Classes], reasons: dict[int, str]) -> Iterator[Classes]:
    """Sets of two or more classes that occur equally often in every tensor, and are not fixed."""
    occurrences: dict[int, list[tuple[int, int]]] = {}
    distinct = {tensor.tobytes(): tensor for tensor in tensors}
    for number, tensor in enumerate(distinct.values()):
        classes, counts = np.unique(tensor, return_counts=True)
        for c, count in zip(classes.tolist(), counts.tolist(), strict=True):
            if c not in reasons:
                occurrences.setdefault(c, []).append((number, count))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for c, where in occurrences.items():
        alike.setdefault(tuple(where), []).append(c)
    return (np.array(sorted(atom), dtype=np.int64) for atom in alike.values() if len(atom) > 1)
