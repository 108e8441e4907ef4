"""Images in memory as bytes; a whole batch is augmented, resized and normalised at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset
from torchvision.transforms import v2

from fxprune.errors import DataError

# Of the image's side; 4 pixels for a 32-pixel image, as is usual on CIFAR.
PADDING_FRACTION = 8

Indices = int | Sequence[int] | slice | torch.Tensor


@dataclass(frozen=True)
class Arrays:
    """Raw images and labels of one split.

    Attributes:
        images: uint8, or float32 scaled to [0, 1] (N, C, H, W).
        labels: int64 (N,), None where there are none.
    """

    images: torch.Tensor
    labels: torch.Tensor | None


def check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int, name: str) -> None:
    """Check that mean and std suit images of ``channels`` channels; grey images may become colour ones.

    Raises:
        DataError: their lengths differ or do not fit, or a std is not positive.
    """
    if len(mean) != len(std):
        raise DataError(f"{name}: {len(mean)} mean and {len(std)} std figures; give one of each per channel")
    if len(mean) != channels and not (channels == 1 and len(mean) == 3):
        raise DataError(
            f"{name} has images of {channels} channel(s) but mean and std have {len(mean)} figure(s); "
            "give one per channel (three for grey images shown to a colour model)"
        )
    if any(s <= 0 for s in std):
        raise DataError(f"{name}: std {tuple(std)} must be positive")


@dataclass(frozen=True, eq=False)
class ArrayDataset(Dataset[Any]):
    """Images held in memory, normalised as they are asked for.

    An integer index gives (float32 image (C, H, W), int label). A list, slice or tensor of indices
    gives a whole batch, (float32 (N, C, H, W), int64 (N,)), which is far faster; ``make_loader`` uses it.
    Without labels an item is the image, or the batch of images, alone.
    Grey images are repeated to three channels where ``mean`` has three figures.

    Attributes:
        images: uint8, or float32 scaled to [0, 1] (N, C, H, W).
        labels: int64 (N,), None where there are none.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, same scale.
        image_size: side to resize to, None for the images' own.
        augment: crop at random from a zero-padded frame and mirror at random; draws from torch's
            global random state.

    Raises:
        DataError: shapes, types or normalisation do not fit.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise DataError(
                f"images must be uint8 or float32 (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels is not None and self.labels.shape != self.images.shape[:1]:
            raise DataError(f"{len(self.images)} images but labels of shape {tuple(self.labels.shape)}")
        check_normalisation(self.mean, self.std, self.images.shape[1], "the data set")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Indices) -> Any:
        """Return one normalised image and its label, or a batch of them."""
        if isinstance(index, slice):
            return self._batch(index)
        # A list may hold single tensors, which torch would take for one index an axis.
        places = torch.as_tensor(index if isinstance(index, int | torch.Tensor) else [int(i) for i in index])
        if places.ndim == 0:
            batch = self._batch(places[None])
            return batch[0] if isinstance(batch, torch.Tensor) else (batch[0][0], int(batch[1][0]))
        return self._batch(places)

    def plain(self) -> ArrayDataset:
        """Return the same images without augmentation."""
        return dataclasses.replace(self, augment=False)

    def _batch(self, index: slice | torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        images = self.images[index]
        if self.augment:
            images = crop_and_mirror(images, padding=images.shape[-1] // PADDING_FRACTION)
        if self.image_size is not None and tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            images = v2.functional.resize(images, [self.image_size, self.image_size], antialias=True)
        if images.shape[1] != len(self.mean):
            images = images.expand(-1, len(self.mean), -1, -1)
        scaled = v2.functional.to_dtype(images, torch.float32, scale=True)
        normalised: torch.Tensor = v2.functional.normalize(scaled, list(self.mean), list(self.std))
        return normalised if self.labels is None else (normalised, self.labels[index])


def crop_and_mirror(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Shift each image by up to ``padding`` pixels over zeros, and mirror every second one or so.

    torchvision's transforms would draw one crop for the whole batch; here each image has its own.

    Args:
        images: (N, C, H, W), any dtype.
        padding: zeros on each side, in pixels.

    Returns:
        New images of the same shape and dtype. Draws from torch's global random state.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    # Advanced indices around a slice put their own axes first: (N, H, W, C).
    each = torch.arange(count)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def make_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int = 128,
    shuffle: bool = False,
    seed: int | None = None,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Return a DataLoader of (images, labels) batches; an ArrayDataset's are built batch by batch.

    Args:
        dataset: an ArrayDataset, a Subset of one, or any map-style data set.
        batch_size: images a batch; the last one may be smaller.
        shuffle: a new order each epoch.
        seed: of the order; None draws from torch's global random state.
        num_workers: worker processes. 0 is best for an ArrayDataset.

    Raises:
        DataError: the batch size is below 1 or the data set is empty.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1")
    count = len(dataset)  # type: ignore[arg-type]
    if count == 0:
        raise DataError("the data set is empty; there is nothing to load")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    if not isinstance(base, ArrayDataset):
        return DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=num_workers, generator=generator)
    positions = range(count)
    order = RandomSampler(positions, generator=generator) if shuffle else SequentialSampler(positions)
    batches = BatchSampler(order, batch_size, drop_last=False)
    # batch_size=None: each list of indices goes to the data set whole.
    return DataLoader(dataset, batch_size=None, sampler=batches, num_workers=num_workers)
