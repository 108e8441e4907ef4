"""Channel classes: which channels of which tensors are one and the same, and which of them may change places, or go.

Every tensor of a graph gets a `Layout`, one class a channel. Channels that an operation ties together, such as those an
add puts on top of each other, are of one class. Two classes may change places everywhere at once if they occur equally
often in every tensor and nothing fixes either: that leaves each tensor with the same classes in another order. A class may
go, everywhere at once, if nothing fixes it and no operation takes anything over all channels; some go together only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

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
        needed: why a class that is not fixed cannot go.
        units: sets of classes, each in increasing order, that can go, each as a whole: one class mostly, those of a group of
            a grouped convolution.
        alike: units by number, in lists of those that occur equally often in every tensor.
    """

    layouts: dict[Node, Layout]
    atoms: tuple[Classes, ...]
    reasons: dict[int, str]
    count: int
    needed: dict[int, str] = field(default_factory=dict)
    units: tuple[Classes, ...] = ()
    alike: tuple[tuple[int, ...], ...] = ()

    def reason(self, node: Node) -> str:
        """Why no two channels of a node's value may change places."""
        classes = self.layouts[node].classes if node in self.layouts else ()
        reasons = [self.reasons[c] for c in map(int, classes) if c in self.reasons]
        return reasons[0] if reasons else "no two of them are read by the same layers"

    def why_needed(self, node: Node) -> str:
        """Why no channel of a node's value can go; "" if some can."""
        classes = list(map(int, self.layouts[node].classes)) if node in self.layouts else []
        if not classes:
            return "its channels are not known"
        reasons = [self.reasons.get(c) or self.needed.get(c, "") for c in classes]
        return "" if "" in reasons else reasons[0]


class Relations:
    """Collects what a walk over the graph finds out about channel classes; `solve` draws the conclusions."""

    def __init__(self) -> None:
        self._count = 0
        self._ties: list[tuple[Classes, Classes]] = []
        self._fixed: list[tuple[Classes, str]] = []
        self._parts: list[Classes] = []
        self._pads: list[tuple[Classes, Classes, Classes]] = []
        self._needed: list[tuple[Classes, str]] = []
        self._together: list[Classes] = []

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

    def need(self, classes: Classes, reason: str) -> None:
        """These classes may change places, but none of them can go."""
        self._needed.append((classes, reason))

    def together(self, classes: Classes) -> None:
        """If one of these classes goes, all of them do."""
        self._together.append(classes)

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
        needed: dict[int, str] = {}
        for classes, reason in self._needed:
            for c in names[classes].tolist():
                needed.setdefault(c, reason)
        renamed = {node: Layout(layout.dim, names[layout.classes]) for node, layout in layouts.items()}
        tensors = [layout.classes for layout in renamed.values()]
        in_tensors = _occurrences(
            tensors
        )  # Groups of a convolution, which channels must not leave, are alike as a whole.
        tensors += [names[part] for part in self._parts]
        for before, inner, after in ([names[part] for part in pad] for pad in self._pads):
            # Constants before and after are alike, unless one of them is tied to a channel between: then the second
            # occurrence of a class may be the constant in one case and the channel in the other.
            constants = np.concatenate([before, after])
            apart = np.intersect1d(constants, inner).size > 0
            tensors += [before, after] if apart else [constants]
            tensors.append(inner)
        atoms = tuple(_atoms(_occurrences(tensors), reasons))
        units = self._units(names, list(in_tensors), needed | reasons)
        return Channels(renamed, atoms, reasons, self._count, needed, units, tuple(_alike(units, in_tensors)))

    def _units(self, names: Classes, classes: list[int], needed: dict[int, str]) -> tuple[Classes, ...]:
        """The sets of classes that can go. What goes only with a class that is needed is needed too, for that reason."""
        tied = [(np.full(len(of) - 1, of[0]), of[1:]) for of in (names[together] for together in self._together)]
        unit_of = _components(self._count, tied)
        members: dict[int, list[int]] = {}
        for c in sorted(classes):
            members.setdefault(int(unit_of[c]), []).append(c)
        found = []
        for unit in members.values():
            reason = next((needed[c] for c in unit if c in needed), None)
            if reason is None:
                found.append(np.array(unit, dtype=np.int64))
            else:
                needed.update(dict.fromkeys(unit, reason))
        return tuple(found)


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


Occurrences = dict[int, list[tuple[int, int]]]  # By class: (number of the tensor, how often it occurs there) each.


def _occurrences(tensors: Iterable[Classes]) -> Occurrences:
    """How often each class occurs in which tensor; tensors with the same channels count as one."""
    found: Occurrences = {}
    distinct = {tensor.tobytes(): tensor for tensor in tensors}
    for number, tensor in enumerate(distinct.values()):
        classes, counts = np.unique(tensor, return_counts=True)
        for c, count in zip(classes.tolist(), counts.tolist(), strict=True):
            found.setdefault(c, []).append((number, count))
    return found


def _atoms(occurrences: Occurrences, reasons: dict[int, str]) -> Iterator[Classes]:
    """Sets of two or more classes that occur equally often in every tensor, and are not fixed."""
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for c, where in occurrences.items():
        if c not in reasons:
            alike.setdefault(tuple(where), []).append(c)
    return (np.array(sorted(atom), dtype=np.int64) for atom in alike.values() if len(atom) > 1)


def _alike(units: Sequence[Classes], occurrences: Occurrences) -> Iterator[tuple[int, ...]]:
    """Units that occur equally often in every tensor, by number."""
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for number, unit in enumerate(units):
        counts: dict[int, int] = {}
        for c in unit.tolist():
            for tensor, count in occurrences[c]:
                counts[tensor] = counts.get(tensor, 0) + count
        alike.setdefault(tuple(sorted(counts.items())), []).append(number)
    return map(tuple, alike.values())
