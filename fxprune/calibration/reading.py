"""Reads the loader into the store: checks batches, holds some images out, mixes some, and keeps those that layers need.

Of several processes each one stores its own batches. What concerns the set as a whole is settled in all of them alike, from the
sizes of all batches.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.calibration.batch_store import BatchStore, BatchValues
from fxprune.calibration.batches import EMPTY, channels_last, count, inputs_of, map_tensors, take, tensors_in
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.mixtures import Mixing
from fxprune.calibration.needed_images import image_step
from fxprune.calibration.sampling import CHECK_EVERY, BatchPlace, as_index, images_taken
from fxprune.calibration.shapes import Example
from fxprune.errors import CalibrationError, OptionsError
from fxprune.runtime.processes import in_order, world

# Held-out images, or mixtures, of several batches are joined up to so many, or to the first batch's size.
LEAST_TOGETHER = 32


@dataclass(frozen=True)
class Slot:
    """One entry of the store.

    Attributes:
        key: in the store.
        batch: number of the loader's batch (the first one) that its images come from.
        place: of its images among all that take part in the statistics; None if they take no part.
        mixed: whether they are mixtures of images, which take no part in statistics and scores.
    """

    key: int
    batch: int
    place: BatchPlace | None
    mixed: bool = False

    @property
    def held_out(self) -> bool:
        """Whether its images take no part in the statistics, and are for scores."""
        return self.place is None and not self.mixed


@dataclass(frozen=True)
class Source:
    """What a loader gave; where several processes share the work, all of them together, but for the slots.

    Attributes:
        images_read: in all batches.
        images: whose statistics are taken.
        held_out: images on which errors are measured, and nothing is fitted.
        step: at which they were taken of those that are not held out, see `images_taken`; 1 for all.
        fingerprint: a hash of the shapes and sums of all batches, to tell one calibration set from another.
        slots: entries of this process's store, in order.
        with_copies: how many images statistics are sampled from: `images`, and their mirror images after them.
    """

    images_read: int
    images: int
    held_out: int
    step: Fraction
    fingerprint: str
    slots: tuple[Slot, ...]
    with_copies: int


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
    mix: bool = False,
    flip: bool = False,
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
        mix: whether mixtures of images are wanted (`fxprune.calibration.mixtures`); a model of one batch size gets none.
        flip: whether images are fitted beside their mirror images, where layers need all the images there are.

    Raises:
        CalibrationError: if the loader is empty, or a batch cannot be used.
        OptionsError: if nothing is there that `flip` could mirror.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    read = list[tuple[int, str]]()
    for key, batch in enumerate(calibration):
        values = inputs_of(batch, placeholders, calibration.number(key), device=device)
        tensors = tensors_in(list(values.values()))
        sums = "".join(str((tuple(x.shape), float(x.sum(dtype=torch.float64)))) for x in tensors)
        read.append((count(list(values.values())) if placeholders else 0, sums))
        in_memory = {node: map_tensors(x, channels_last) for node, x in values.items()} if last else values
        store.put(key, BatchValues(in_memory))
    of_all, places = in_order(read)
    if not of_all:
        raise CalibrationError(EMPTY)
    sizes, keys = [size for size, _ in of_all], {place: key for key, place in enumerate(places)}
    fingerprint = hashlib.sha256("".join(sums for _, sums in of_all).encode()).hexdigest()
    total, step = sum(sizes), Fraction(1)
    masks = calibration.held_out(total).split(sizes)
    out = sum(int(mask.sum()) for mask in masks)
    example = _example(graph_module, calibration, store) if out or (patches and placeholders and fit) else None
    if out and (example is None or not example.takes_few):
        masks = _whole_batches(sizes, out)
        out = sum(int(mask.sum()) for mask in masks)
    if patches and placeholders and fit and example is not None:
        step = image_step(example, images=total - out, patches=patches, least=least)
    keys_after, together = itertools.count(len(keys)), max(LEAST_TOGETHER, sizes[0])
    held_out, mixed = _Joiner(store, together, keys_after), _Joiner(store, together, keys_after, mixed=True)
    mix = mix and fit and example is not None and example.takes_few
    mixing = Mixing.of(int((total - out) / step))
    slots = list[Slot]()
    before, place = 0, BatchPlace(0, 0, 0)  # Of the images that are not held out, and of those of them that are taken.
    for turn, of_batch in enumerate(masks):
        left = (~of_batch).nonzero()[:, 0]
        taken = images_taken(len(left), step, first=before, turn=turn) if fit or not out else ()
        before += len(left)
        place = replace(place, images=len(taken))
        if turn in keys:
            key = keys[turn]
            number = calibration.number(key)
            if len(taken) < len(of_batch):
                values = store.take(key).dense_values
                held_out.add(number, take(values, of_batch.nonzero()[:, 0].to(device)))
                if taken:
                    store.put(key, BatchValues(take(values, left[as_index(taken, left.device)].to(device))))
            if mix and taken and (mixtures := mixing.mixtures(store.look(key).dense_values, place)) is not None:
                mixed.add(number, mixtures)
            if taken or not placeholders:
                slots.append(Slot(key, number, place))
        if taken or not placeholders:
            place = BatchPlace(place.number + 1, place.first + len(taken), 0)
    images, with_copies = place.first, place.first
    if flip and fit and step == 1:
        # A multiple of CHECK_EVERY, so that an image and its mirror image are fitted together or check together.
        first = -(-images // CHECK_EVERY) * CHECK_EVERY
        slots += [_mirror_image(slot, store, next(keys_after), place.number, first) for slot in slots]
        with_copies = first + images
    slots += (*held_out.finish(), *mixed.finish())
    return Source(total, images, out, step, fingerprint, tuple(slots), with_copies)


def mirrored(values: list[Any], chosen: Tensor | None = None) -> list[Any]:
    """A model's inputs with images (N, C, H, W) turned from right to left; other inputs as they are.

    Args:
        values: the inputs.
        chosen: which images are turned, (N,) bool; None for all.

    Raises:
        OptionsError: none of them holds images.
    """
    images = count(values)
    if not any(_holds_images(x, images) for x in tensors_in(values)):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors_in(values))
        raise OptionsError(f"flip mirrors images (N, C, H, W); the model's inputs have shapes {shapes}")

    def turned(x: Tensor) -> Tensor:
        if not _holds_images(x, images):
            return x
        return x.flip(-1) if chosen is None else torch.where(chosen.to(x.device)[:, None, None, None], x.flip(-1), x)

    found: list[Any] = map_tensors(values, turned)
    return found


def _holds_images(x: Tensor, images: int) -> bool:
    return x.dim() == 4 and len(x) == images


def _mirror_image(slot: Slot, store: BatchStore, key: int, batches: int, first: int) -> Slot:
    """Another entry of the store, of a batch's mirror images, at places that come after so many batches and images."""
    assert slot.place is not None
    values = store.look(slot.key).dense_values
    store.put(key, BatchValues(dict(zip(values, mirrored(list(values.values())), strict=True))))
    place = replace(slot.place, number=batches + slot.place.number, first=first + slot.place.first)
    return replace(slot, key=key, place=place)


def _example(graph_module: GraphModule, calibration: Calibration, store: BatchStore) -> Example | None:
    """Some images and the shapes on them; None for a model that fails on them: the run that follows names the place."""
    try:
        first = list(store.look(0).dense_values.values()) if world().count == 1 else None
        return calibration.example(graph_module, first)
    except CalibrationError:
        return None


def _whole_batches(sizes: list[int], least: int) -> list[Tensor]:
    """For models of one batch size: the last batches held out, with so many images together, but not half of all."""
    masks, left = [], least
    for number, size in enumerate(reversed(sizes)):
        out = left > 0 and 2 * (number + 1) <= len(sizes)
        masks.append(torch.full((size,), out))
        left -= size if out else 0
    return masks[::-1]


class _Joiner:
    """Joins images that are not fitted, batch by batch where their shapes allow it, and puts them into the store.

    Args:
        store: where they wait.
        together: up to so many are joined.
        keys: in the store, of new entries.
        mixed: as in `Slot`.
    """

    def __init__(self, store: BatchStore, together: int, keys: Iterator[int], *, mixed: bool = False) -> None:
        self._store, self._together, self._keys, self._mixed = store, together, keys, mixed
        self._slots: list[Slot] = []
        self._batch = 0
        self._parts: list[dict[Node, Any]] = []
        self._count = 0

    def add(self, batch: int, values: dict[Node, Any]) -> None:
        """Add some images of a batch; there may be none."""
        images = count(list(values.values()))
        if not images:
            return
        if self._parts and (_kind(values) != _kind(self._parts[0]) or self._count + images > self._together):
            self._flush()
        self._batch = self._batch if self._parts else batch
        self._parts.append(values)
        self._count += images

    def finish(self) -> list[Slot]:
        """The slots of all that were added."""
        self._flush()
        return self._slots

    def _flush(self) -> None:
        if not self._parts:
            return
        joined = dict(zip(self._parts[0], _joined([list(part.values()) for part in self._parts]), strict=True))
        key = next(self._keys)
        self._store.put(key, BatchValues(joined))
        self._slots.append(Slot(key, self._batch, None, self._mixed))
        self._parts, self._count = [], 0


def _kind(values: dict[Node, Any]) -> list[Any]:
    """What has to be alike for batches to be joined: shapes and dtypes of what holds images, and all other tensors."""
    held = list(values.values())
    images = count(held)
    return [(x.shape[1:], x.dtype) if x.dim() and len(x) == images else id(x) for x in tensors_in(held)]


def _joined(parts: list[list[Any]]) -> list[Any]:
    """Several batches as one."""
    if len(parts) == 1:
        return parts[0]
    images = [count(part) for part in parts]
    others = [list(tensors_in(part)) for part in parts]
    index = iter(range(len(others[0])))

    def join(x: Tensor) -> Tensor:
        of_all = [tensors[i] for tensors, i in zip(others, [next(index)] * len(others), strict=True)]
        if not x.dim() or len(x) != images[0]:
            return x
        whole = torch.cat(of_all)
        last = x.dim() == 4 and x[:1].is_contiguous(memory_format=torch.channels_last)
        return whole.contiguous(memory_format=torch.channels_last) if last else whole

    joined: list[Any] = map_tensors(parts[0], join)
    return joined
