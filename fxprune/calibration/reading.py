"""Reads the loader into the store: checks each batch, puts it on the device, and keeps the images that a layer needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch.fx import GraphModule

from fxprune.calibration.batch_store import BatchStore, BatchValues
from fxprune.calibration.batches import EMPTY, assign, channels_last
from fxprune.calibration.needed_images import image_step, select_images
from fxprune.calibration.sampling import BatchPlace, as_index, images_taken
from fxprune.errors import CalibrationError


@dataclass(frozen=True)
class Source:
    """What a loader gave.

    Attributes:
        images_read: in all batches.
        images: kept of them.
        step: at which they were taken, see `images_taken`; 1 for all.
        places: of the batches kept, among what was kept.
        fingerprint: a hash of the shapes and sums of all batches, to tell one calibration set from another.
    """

    images_read: int
    images: int
    step: Fraction
    places: tuple[BatchPlace, ...]
    fingerprint: str


@torch.inference_mode()
def read_into(
    store: BatchStore,
    loader: Iterable[Any],
    graph_module: GraphModule,
    *,
    device: torch.device,
    last: bool,
    patches: int,
    least: int | None,
) -> Source:
    """Fill an empty store with the values of the graph's placeholders.

    Args:
        store: where they wait.
        loader: read once.
        graph_module: with observers, whose layers tell which images are needed.
        device: of the values.
        last: whether images are to have their channels last in memory.
        patches: for each column of a layer, see `sample_patches`; 0 keeps all images.
        least: images that always take part, see there.

    Raises:
        CalibrationError: if the loader is empty, or a batch cannot be used.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    digest, sizes = hashlib.sha256(), list[int]()
    for number, batch in enumerate(loader):
        values = assign(placeholders, batch, number, device=device)
        sizes.append(len(values[placeholders[0]]) if placeholders else 0)
        if placeholders:
            first = values[placeholders[0]]
            digest.update(str((tuple(first.shape), float(first.sum(dtype=torch.float64)))).encode())
        store.put(number, BatchValues({node: channels_last(x) for node, x in values.items()} if last else values))
    if not len(store):
        raise CalibrationError(EMPTY)
    read, step = sum(sizes), Fraction(1)
    if patches and placeholders:
        step = image_step(graph_module, store.look(0).dense_values, images=read, patches=patches, least=least)
    if step > 1:
        sizes = _keep_every(store, sizes, step, device)
    ends = accumulate(sizes)
    places = (BatchPlace(n, end - size, size) for n, (size, end) in enumerate(zip(sizes, ends, strict=True)))
    return Source(read, sum(sizes), step, tuple(places), digest.hexdigest())


def _keep_every(store: BatchStore, sizes: list[int], step: Fraction, device: torch.device) -> list[int]:
    """Leave in the store the images that are taken at a step, and no batch of which none is; returns how many of each."""
    kept: list[int] = []
    for number, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        values = store.take(number).dense_values
        taken = images_taken(size, step, first=end - size, turn=number)
        if taken:
            store.put(len(kept), BatchValues(select_images(values, as_index(taken, device))))
            kept.append(len(taken))
    return kept
