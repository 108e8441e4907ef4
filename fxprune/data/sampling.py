"""Chooses calibration images: a fixed seed, and classes as even as the data set allows."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from fxprune.data.array_dataset import make_loader
from fxprune.errors import DataError, DataWarning


def calibration_loader(
    dataset: Dataset[Any],
    images: int = 1024,
    batch_size: int = 128,
    seed: int | None = 0,
    balanced: bool = True,
) -> DataLoader[Any]:
    """Return a loader of calibration batches, the same ones each time.

    Args:
        dataset: a map-style data set of (image, label); its augmentation is left out where it is one
            of ``load_data``'s, and is the caller's affair otherwise.
        images: how many images; all there are, with a warning, where there are fewer.
        batch_size: images a batch.
        seed: of the choice and of the order. None takes the first images in their order.
        balanced: draw every class equally often; a class with too few images gives all it has and the
            others make up for it. False draws from all images alike.

    Raises:
        DataError: ``images`` is below 1; ``balanced`` and the labels are not to be had without decoding
            every image; ``balanced`` and no seed.
    """
    chosen, _ = calibration_split(dataset, images, seed, balanced)
    return make_loader(chosen, batch_size=batch_size)


def calibration_split(
    dataset: Dataset[Any], images: int = 1024, seed: int | None = 0, balanced: bool = True
) -> tuple[Subset[Any], Subset[Any]]:
    """The images of ``calibration_loader``, and all the others, on which a result can be scored.

    Raises:
        DataError: as ``calibration_loader``.
    """
    chosen = _choose(dataset, images, seed, balanced).tolist()
    taken = set(chosen)
    plain = _plain(dataset)
    return Subset(plain, chosen), Subset(plain, [place for place in range(len(plain)) if place not in taken])  # type: ignore[arg-type]


def calibration_tensors(
    dataset: Dataset[Any], images: int = 1024, seed: int | None = 0, balanced: bool = True
) -> torch.Tensor:
    """Return the images of ``calibration_loader`` as one float32 tensor (images, C, H, W).

    Raises:
        DataError: as ``calibration_loader``.
    """
    batches = calibration_loader(dataset, images, min(images, 256), seed, balanced)
    return torch.cat([batch if isinstance(batch, torch.Tensor) else batch[0] for batch in batches])


def _choose(dataset: Dataset[Any], images: int, seed: int | None, balanced: bool) -> npt.NDArray[np.int64]:
    available = len(dataset)  # type: ignore[arg-type]
    if images < 1:
        raise DataError(f"images is {images}; calibration needs at least 1")
    if available == 0:
        raise DataError("the data set is empty; there is nothing to calibrate on")
    if images > available:
        warnings.warn(
            f"{images} calibration images were asked for, the data set has {available}; all of these are taken",
            DataWarning,
            stacklevel=4,
        )
        images = available
    if seed is None:
        if balanced:
            raise DataError("seed=None takes the first images as they come; it needs balanced=False")
        return np.arange(images)
    generator = torch.Generator().manual_seed(seed)
    shuffled: npt.NDArray[np.int64] = torch.randperm(available, generator=generator).numpy()
    if not balanced:
        return shuffled[:images]
    labels = _labels(dataset)
    if labels is None:
        raise DataError(
            f"{type(dataset).__name__} has neither `labels` nor `targets`, which a balanced choice needs; "
            "pass balanced=False"
        )
    # Every image's place within its class, in shuffled order: all firsts, then all seconds, ...
    place = np.empty(available, dtype=np.int64)
    for label in np.unique(labels):
        of_class = shuffled[labels[shuffled] == label]
        place[of_class] = np.arange(len(of_class))
    # Stable sort: which classes get the one image that is left over is up to the shuffle.
    chosen = shuffled[np.argsort(place[shuffled], kind="stable")][:images]
    # Mixed anew, so that no batch holds one place only.
    mixed: npt.NDArray[np.int64] = chosen[torch.randperm(images, generator=generator).numpy()]
    return mixed


def _labels(dataset: Any) -> npt.NDArray[np.int64] | None:
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset)
        return None if inner is None else np.take(inner, np.asarray(dataset.indices))
    for attribute in ("labels", "targets"):
        if getattr(dataset, attribute, None) is not None:
            found: npt.NDArray[np.int64] = np.asarray(getattr(dataset, attribute), dtype=np.int64)
            return found.reshape(-1)
    return None


def _plain(dataset: Dataset[Any]) -> Dataset[Any]:
    if isinstance(dataset, Subset):
        return Subset(_plain(dataset.dataset), dataset.indices)
    if hasattr(dataset, "plain"):
        plain: Dataset[Any] = dataset.plain()
        return plain
    return dataset
