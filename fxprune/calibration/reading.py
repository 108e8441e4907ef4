"""Reads the loader into the store: checks batches, holds some images out, and keeps of the others those that layers need."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.calibration.batch_store import BatchStore, BatchValues
from fxprune.calibration.batches import EMPTY, assign, channels_last
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.needed_images import image_step, select_images
from fxprune.calibration.sampling import chosen_images
from fxprune.errors import CalibrationError

LEAST_TOGETHER = 32  # Held-out images of several batches are joined up to so many, or to the first batch's size.


@dataclass(frozen=True)
class Slot:
    """One entry of the store.

    Attributes:
        key: in the store.
        batch: number of the loader's batch (the first one) that its images come from.
        held_out: whether they take no part in the statistics.
    """

    key: int
    batch: int
    held_out: bool = False


@dataclass(frozen=True)
class Source:
    """What a loader gave.

    Attributes:
        images_read: in all batches.
        images: whose statistics are taken.
        held_out: images on which errors are measured, and nothing is fitted.
        step: of every how many images of batch n, from n % step on, one was kept.
        fingerprint: a hash of the shapes and sums of all batches, to tell one calibration set from another.
        slots: entries of the store, in order.
    """

    images_read: int
    images: int
    held_out: int
    step: float
    fingerprint: str
    slots: tuple[Slot, ...]


@torch.inference_mode()
def read_into(
    store: BatchStore,
    calibration: Calibration,
    graph_module: GraphModule,
    *,
    device: torch.device,
    last: bool,
    patches: int,
    least: int | None,
    fit: bool = True,
) -> Source:
    """Fill an empty store with the values of the graph's placeholders.

    Args:
        store: where they wait.
        calibration: its loader is read once.
        graph_module: with observers, whose layers tell which images are needed.
        device: of the values.
        last: whether images are to have their channels last in memory.
        patches: for each column of a layer, see `sample_patches`; 0 keeps all images.
        least: images that always take part, see there.
        fit: whether statistics are taken; else only the images that are held out are kept, if there are any.

    Raises:
        CalibrationError: if the loader is empty, or a batch cannot be used.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    digest, sizes = hashlib.sha256(), []
    for number, batch in enumerate(calibration):
        values = assign(placeholders, batch, number, device=device)
        if placeholders:
            first = values[placeholders[0]]
            sizes.append(len(first))
            digest.update(str((tuple(first.shape), float(first.sum(dtype=torch.float64)))).encode())
        store.put(number, BatchValues({node: channels_last(x) for node, x in values.items()} if last else values))
    if not len(store):
        raise CalibrationError(EMPTY)
    slots = tuple(Slot(number, number) for number in range(len(store)))
    total = sum(sizes)
    masks = calibration.held_out(total).split(sizes) if placeholders else ()
    count = sum(int(mask.sum()) for mask in masks)
    step = 1.0
    if patches and placeholders and fit:
        first_batch = store.look(0).dense_values
        step = image_step(graph_module, first_batch, images=total - count, patches=patches, least=least)
    if step == 1 and not count:
        return Source(total, total, 0, step, digest.hexdigest(), slots)
    kept, waiting, images = [], _HeldOut(store, max(LEAST_TOGETHER, sizes[0]), len(slots)), 0
    for slot, mask in zip(slots, masks, strict=True):
        values = store.take(slot.key).dense_values
        waiting.add(slot.batch, select_images(values, mask.nonzero()[:, 0].to(device)))
        left = (~mask).nonzero()[:, 0]
        of_batch = min(step, max(1, len(left)))  # One at least: the last batch may be a short one.
        left = left[chosen_images(len(left), of_batch, slot.batch % of_batch, torch.device("cpu"))]
        if len(left) and (fit or not count):
            store.put(slot.key, BatchValues(select_images(values, left.to(device))))
            kept.append(slot)
            images += len(left)
    return Source(total, images, count, step, digest.hexdigest(), (*kept, *waiting.finish()))


class _HeldOut:
    """Held-out images, joined batch by batch where their shapes allow it and put into the store."""

    def __init__(self, store: BatchStore, together: int, key: int) -> None:
        self._store, self._together, self._key = store, together, key
        self._slots: list[Slot] = []
        self._batch = 0
        self._parts: list[dict[Node, Any]] = []
        self._count = 0

    def add(self, batch: int, values: dict[Node, Any]) -> None:
        """Add a batch's held-out images; there may be none."""
        count = len(next(iter(values.values())))
        if not count:
            return
        if self._parts and (_kind(values) != _kind(self._parts[0]) or self._count + count > self._together):
            self._flush()
        self._batch = self._batch if self._parts else batch
        self._parts.append(values)
        self._count += count

    def finish(self) -> list[Slot]:
        """The slots of all held-out images."""
        self._flush()
        return self._slots

    def _flush(self) -> None:
        if not self._parts:
            return
        joined = {node: _joined([part[node] for part in self._parts]) for node in self._parts[0]}
        self._store.put(self._key, BatchValues(joined))
        self._slots.append(Slot(self._key, self._batch, held_out=True))
        self._key, self._parts, self._count = self._key + 1, [], 0


def _kind(values: dict[Node, Any]) -> list[Any]:
    """What has to be alike for batches to be joined: shapes and dtypes, and values that are no images."""
    size = len(next(iter(values.values())))
    return [
        (x.shape[1:], x.dtype) if isinstance(x, Tensor) and x.dim() and len(x) == size else id(x)
        for x in values.values()
    ]


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1 or not isinstance(parts[0], Tensor) or parts[0] is parts[-1]:
        return parts[0]
    last = parts[0].dim() == 4 and parts[0][:1].is_contiguous(memory_format=torch.channels_last)
    whole = torch.cat(parts)
    return whole.contiguous(memory_format=torch.channels_last) if last else whole
