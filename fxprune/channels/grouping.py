"""Searches the permutation of each atom's channels that an N:M pattern costs least in all layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.layout import Channels, Classes
from fxprune.pattern import NMPattern
from fxprune.solvers.permutation import View, lost, permute

SWEEPS = 4
MIN_GAIN = 1e-3


@dataclass(frozen=True)
class Reader:
    """One layer, or one group of a grouped convolution, that is to be pruned N:M.

    Attributes:
        scores: (P, C) what each of its weights costs to lose, columns in the order of its input channels.
        classes: (C,) class of each input channel, none twice.
    """

    scores: Tensor
    classes: Classes


@dataclass(frozen=True)
class _Place:
    """The columns (n,) in which a reader holds an atom's classes."""

    reader: int
    slots: Classes


@dataclass(frozen=True)
class Grouping:
    """`source[c]` is the class that takes the place of class c; what each reader loses before and after."""

    source: Classes
    before: tuple[float, ...]
    after: tuple[float, ...]


def search_grouping(readers: Sequence[Reader], channels: Channels, pattern: NMPattern, *, seed: int = 0) -> Grouping:
    """Permute atom after atom, each with the others as they are, while that lowers what the readers lose together.

    Atoms that share a group of M columns, as where a concatenation does not join at a multiple of M, are searched again
    after their neighbours have changed, up to SWEEPS times. A gain below MIN_GAIN of an atom's loss is left alone.
    """
    places = _places(readers, channels)
    source = np.arange(channels.count)
    columns = [torch.arange(len(reader.classes), device=reader.scores.device) for reader in readers]
    pending = [a for a, held in enumerate(places) if held]
    for _ in range(SWEEPS):
        changed: list[int] = []
        for a in pending:
            atom, held = channels.atoms[a], places[a]
            views = [
                View(
                    readers[place.reader].scores[:, columns[place.reader]],
                    torch.from_numpy(place.slots).to(columns[place.reader].device),
                )
                for place in held
            ]
            found = permute(views, pattern, seed=seed)
            if found.before - found.after <= MIN_GAIN * found.before:
                continue
            changed.append(a)
            source[atom] = source[atom[found.order.cpu().numpy()]]
            for place, view in zip(held, views, strict=True):
                column = columns[place.reader]
                column[view.slots] = column[view.slots[found.order]]
        pending = _neighbours(changed, places, pattern.m)
    return Grouping(
        source,
        tuple(float(lost(reader.scores, pattern).sum()) for reader in readers),
        tuple(float(lost(r.scores[:, column], pattern).sum()) for r, column in zip(readers, columns, strict=True)),
    )


def _places(readers: Sequence[Reader], channels: Channels) -> list[list[_Place]]:
    """For each atom, where the readers hold it."""
    atom_of = np.full(channels.count, -1)
    index = np.zeros(channels.count, dtype=np.int64)
    for a, atom in enumerate(channels.atoms):
        atom_of[atom], index[atom] = a, np.arange(len(atom))
    places: list[list[_Place]] = [[] for _ in channels.atoms]
    for r, reader in enumerate(readers):
        atoms = atom_of[reader.classes]
        for a in np.unique(atoms[atoms >= 0]).tolist():
            columns = np.flatnonzero(atoms == a)
            slots = np.empty_like(columns)
            slots[index[reader.classes[columns]]] = columns
            places[a].append(_Place(r, slots))
    return places


def _neighbours(changed: Sequence[int], places: Sequence[Sequence[_Place]], m: int) -> list[int]:
    """The atoms that share a group with a changed atom, in order."""
    holders: dict[tuple[int, int], set[int]] = {}
    for a, held in enumerate(places):
        for place in held:
            for group in np.unique(place.slots // m).tolist():
                holders.setdefault((place.reader, group), set()).add(a)
    found: set[int] = set()
    for sharing in holders.values():
        for a in sharing.intersection(changed):
            found |= sharing - {a}
    return sorted(found)
