"""Reads the loader into the store: checks each batch, puts it on the device, and keeps the images that a layer needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from fxprune.calibration.batch_store import BatchStore, BatchValues
from fxprune.calibration.batches import EMPTY, channels_last, count, inputs_of, map_tensors, take, tensors_in
from fxprune.calibration.needed_images import image_step
from fxprune.calibration.sampling import chosen_images
from fxprune.errors import CalibrationError


@dataclass(frozen=True)
class Source:
    """What a loader gave.

    Attributes:
        images_read: in all batches.
        images: kept of them.
        step: of every how many images of batch n, from n % step on, one was kept.
        fingerprint: a hash of the shapes and sums of all batches, to tell one calibration set from another.
    """

    images_read: int
    images: int
    step: float
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
    digest, images = hashlib.sha256(), 0
    for number, batch in enumerate(loader):
        values = inputs_of(batch, placeholders, number, device=device)
        if placeholders:
            images += count(list(values.values()))
        for x in tensors_in(list(values.values())):
            digest.update(str((tuple(x.shape), float(x.sum(dtype=torch.float64)))).encode())
        store.put(
            number, BatchValues({n: map_tensors(x, channels_last) for n, x in values.items()} if last else values)
        )
    if not len(store):
        raise CalibrationError(EMPTY)
    read, step = images, 1.0
    if patches and placeholders:
        step = image_step(graph_module, store.look(0).dense_values, images=images, patches=patches, least=least)
    if step > 1:
        images = 0
        for number in range(len(store)):
            values = store.take(number).dense_values
            size = count(list(values.values()))
            of_batch = min(step, size)  # One at least: the last batch may be a short one.
            chosen = chosen_images(size, of_batch, number % of_batch, device)
            images += len(chosen)
            store.put(number, BatchValues(take(values, chosen)))
    return Source(read, images, step, digest.hexdigest())
