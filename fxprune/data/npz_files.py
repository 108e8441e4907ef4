"""Reads images and labels from .npz files: MedMNIST's layout, or a row of JPEG files."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from fxprune.data.array_dataset import ArrayDataset, Arrays
from fxprune.data.image_arrays import FORMS, as_images
from fxprune.errors import DataError

JPEG_KEYS = ("jpeg", "offsets", "labels")
LAYOUTS = (
    f"either train_images, train_labels, test_images and test_labels (images {FORMS}), or jpeg, offsets and labels"
)

Raw = npt.NDArray[Any]


def load_npz(
    path: str | Path,
    split: str | None = None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int | None = None,
    first: int | None = None,
) -> ArrayDataset:
    """Load one split of an .npz file, without the cost of the others.

    Args:
        path: the file.
        split: "train", "val" or "test" of a file in MedMNIST's layout; None for a file of JPEGs.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, same scale.
        image_size: side to resize to, None for the images' own.
        first: decode and keep only this many images, from the start.

    Raises:
        DataError: the file is absent or malformed, or has no such split.
    """
    file = Path(path)
    arrays = read_npz(file, (split,), first)[split]
    return ArrayDataset(arrays.images, arrays.labels, mean, std, image_size)


def holds_jpeg(path: Path) -> bool:
    """Say whether an .npz file holds a row of JPEG files.

    Raises:
        DataError: the file is absent or no .npz file.
    """
    with _open(path) as file:
        return "jpeg" in file


def read_npz(path: Path, splits: tuple[str | None, ...], first: int | None = None) -> dict[str | None, Arrays]:
    """Read splits of an .npz file.

    Args:
        path: the file.
        splits: names in MedMNIST's layout, or (None,) for a file of JPEGs, which is one split.
        first: keep only this many images of each, from the start.

    Returns:
        For each split its images, uint8 (N, C, H, W), and labels, int64 (N,).

    Raises:
        DataError: the file is absent or malformed, or lacks a split.
    """
    if first is not None and first < 1:
        raise DataError(f"first is {first}; it must be at least 1")
    with _open(path) as file:
        return {split: _read_split(file, split, first, path) for split in splits}


def read_unlabelled(path: Path) -> dict[str, Arrays]:
    """Read images without labels from an .npy file, or from an .npz file of any keys.

    Returns:
        "train", and "test" where the file holds train_images and test_images; labels are None.

    Raises:
        DataError: the file is absent or malformed, or it does not say which of its arrays are images.
    """
    if path.suffix == ".npy":
        if not path.is_file():
            raise DataError(f"there is no data file {path}")
        try:
            found = {"train": as_images(np.load(path, allow_pickle=False), str(path))}
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path} is not a readable .npy file: {error}") from error
    else:
        with _open(path) as file:
            try:
                if "jpeg" in file:
                    found = {"train": _decode(file["jpeg"], file["offsets"], len(file["offsets"]) - 1, None, path)}
                else:
                    keys = _image_keys(file, path)
                    found = {split: as_images(file[key], f"{key} in {path}") for split, key in keys.items()}
            except (ValueError, KeyError) as error:  # an array of Python objects; JPEGs without offsets
                raise DataError(f"{path}: {error}") from error
    for split, images in found.items():
        if len(images) == 0:
            raise DataError(f"{path} holds no images for {split}")
    return {split: Arrays(images, None) for split, images in found.items()}


def _image_keys(file: Mapping[str, Raw], path: Path) -> dict[str, str]:
    """Which arrays are the training images, and the test images where there are some."""
    if "train_images" in file:
        return {split: f"{split}_images" for split in ("train", "test") if f"{split}_images" in file}
    usual = [key for key in ("images", "x", "X", "data") if key in file]
    candidates = usual or [key for key in file if file[key].ndim in (3, 4)]
    if len(candidates) != 1:
        raise DataError(
            f"{path} does not say which of its arrays are images: it holds {', '.join(file)}; name one `images`"
        )
    return {"train": candidates[0]}


def has_labels(path: Path) -> bool:
    """Whether an .npz file holds training and test images, both with labels."""
    with _open(path) as file:
        return all(f"{split}_{what}" in file for split in ("train", "test") for what in ("images", "labels"))


def splits_of(path: Path) -> tuple[str, ...]:
    """List the splits of a file in MedMNIST's layout, in the order train, val, test."""
    with _open(path) as file:
        return tuple(split for split in ("train", "val", "test") if f"{split}_images" in file)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise DataError(f"{path} holds a single array; an .npz file is needed with {LAYOUTS}")
    return file


def _read_split(file: Mapping[str, Raw], split: str | None, first: int | None, path: Path) -> Arrays:
    wanted = JPEG_KEYS if split is None else (f"{split}_images", f"{split}_labels")
    absent = [key for key in wanted if key not in file]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}; it holds {', '.join(file)}. Needed: {LAYOUTS}")
    try:
        arrays = [file[key] for key in wanted]
    except ValueError as error:  # an array of Python objects
        raise DataError(f"{path}: {error}") from error
    labels = _labels(arrays[-1], path)
    if split is None:
        images = _decode(arrays[0], arrays[1], len(labels), first, path)
    else:
        images = as_images(arrays[0], f"{split}_images in {path}")
    if len(images) == 0:
        raise DataError(f"{path} holds no images for {split or 'its split'}")
    if split is not None and len(images) != len(labels):
        raise DataError(f"{path}: {len(images)} {split} images but {len(labels)} labels")
    return Arrays(images[:first], torch.from_numpy(labels[:first]))


def _labels(raw: Raw, path: Path) -> npt.NDArray[np.int64]:
    flat = raw[:, 0] if raw.ndim == 2 and raw.shape[1] == 1 else raw
    if flat.ndim != 1 or not np.issubdtype(flat.dtype, np.integer):
        raise DataError(
            f"{path}: labels are {raw.dtype} {raw.shape}; one whole number an image is needed, (N,) or (N, 1)"
        )
    if len(flat) and flat.min() < 0:
        raise DataError(f"{path}: the smallest label is {flat.min()}; classes count from 0")
    return flat.astype(np.int64)


def _decode(row: Raw, offsets: Raw, count: int, first: int | None, path: Path) -> torch.Tensor:
    if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != len(row) or (np.diff(offsets) <= 0).any():
        raise DataError(
            f"{path}: offsets must rise from 0 to {len(row)}, the bytes in jpeg, in {count + 1} steps for "
            f"{count} labels; found {len(offsets)} from {offsets[:1]} to {offsets[-1:]}"
        )
    count = count if first is None else min(first, count)
    images = [_decode_one(row[offsets[i] : offsets[i + 1]], i, path) for i in range(count)]
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1:
        raise DataError(f"{path}: images differ in shape, {shapes[0]} and {shapes[-1]}; use an image folder")
    stacked = np.stack(images)
    return as_images(stacked, f"images in {path}")


def _decode_one(data: Raw, index: int, path: Path) -> Raw:
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: image {index} cannot be decoded: {error}") from error
