"""A data set by its name or its path, split, normalised and described."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fxprune.data.array_dataset import ArrayDataset, Arrays, check_normalisation
from fxprune.data.image_folder import read_folder
from fxprune.data.named import NAMED, read_named
from fxprune.data.npz_files import holds_jpeg, read_npz, splits_of
from fxprune.errors import DataError

DEFAULT_ROOT = Path.home() / ".cache" / "fxprune" / "data"


@dataclass(frozen=True)
class DataInfo:
    """Describes the images that a loaded data set gives.

    Attributes:
        name: the name or path that it was asked for by.
        num_classes: classes, counted from 0.
        input_shape: (C, H, W) of one image as the model sees it.
        mean: per channel, that images scaled to [0, 1] were normalised with.
        std: per channel, same scale.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class DataSplits:
    """A data set's splits; each item is (float32 image (C, H, W), int label).

    Attributes:
        train: the training split, augmented where asked for.
        test: the test split.
        info: what the images are.
        val: the validation split, where the data set has one of its own.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    info: DataInfo
    val: Dataset[Any] | None = None


def list_data() -> list[str]:
    """List the data sets known by name."""
    return sorted(NAMED)


def load_data(
    name_or_path: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    augment: bool = False,
    root: str | Path | None = None,
    download: bool = False,
) -> DataSplits:
    """Load a data set.

    Args:
        name_or_path: one of ``list_data()``; or an .npz file in MedMNIST's layout; or one of a pair
            of JPEG .npz files, ``*_train.npz`` and ``*_test.npz``; or a folder of images with train/ and
            test/ (or val/), one subfolder a class.
        mean: per channel, of images scaled to [0, 1]: what the model was trained with, as in its
            ModelInfo. None takes the figures published for a named data set. Three figures for grey
            images repeat them to three channels; one figure for a folder of colour images turns them grey.
        std: per channel, same scale; given with ``mean``.
        image_size: side to resize to. None keeps the images' own; a folder of images needs it.
        augment: vary the training images: colour ones in memory are cropped from a frame of zeros an
            eighth wider on each side and mirrored, those of a folder are cropped to a random part and
            mirrored. Grey images in memory stay as they are: a mirrored digit is no digit.
        root: folder of torchvision's files; None is ~/.cache/fxprune/data.
        download: fetch a named data set that is not there.

    Returns:
        The splits. ``calibration_loader`` leaves augmentation out.

    Raises:
        DataError: unknown name, absent or malformed file, or a normalisation that is missing or does
            not fit.
    """
    name = str(name_or_path)
    path = Path(name_or_path)
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size is {image_size}; it must be at least 1 pixel")
    if name in NAMED:
        if mean is None and std is None:
            mean, std = NAMED[name].mean, NAMED[name].std
        figures = _figures(name, mean, std)
        folder = DEFAULT_ROOT if root is None else Path(root)
        return _in_memory(name, read_named(name, folder, download), figures, image_size, augment)
    if path.is_dir():
        return _folder(path, _figures(name, mean, std), image_size, augment)
    if path.suffix == ".npz":
        figures = _figures(name, mean, std)
        return _in_memory(name, _npz_splits(path), figures, image_size, augment)
    close = difflib.get_close_matches(name, NAMED, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(list_data())}"
    raise DataError(f"{name!r} is neither a known data set, nor a folder, nor an .npz file; {hint}")


@dataclass(frozen=True)
class _Figures:
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _figures(name: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> _Figures:
    if mean is None or std is None:
        raise DataError(
            f"{name}: mean= and std= are needed, both: the figures that the model was trained with "
            "(fxprune.models.model_info(name) has them)"
        )
    return _Figures(tuple(mean), tuple(std))


def _npz_splits(path: Path) -> dict[str, Arrays]:
    if not holds_jpeg(path):
        found = splits_of(path)
        wanted = found if {"train", "test"} <= set(found) else ("train", "test")
        return {split: arrays for split, arrays in read_npz(path, wanted).items() if split is not None}
    files = {}
    for split, other in (("train", "test"), ("test", "train")):
        stem = path.stem.removesuffix(f"_{other}") + f"_{split}" if path.stem.endswith(f"_{other}") else path.stem
        files[split] = path.with_name(f"{stem}.npz")
    if files["train"] == files["test"] or not all(file.is_file() for file in files.values()):
        raise DataError(
            f"{path} holds one split as JPEGs; load_data needs *_train.npz and *_test.npz side by side; "
            "fxprune.data.load_npz loads one split alone"
        )
    return {split: read_npz(file, (None,))[None] for split, file in files.items()}


def _in_memory(
    name: str, splits: Mapping[str, Arrays], figures: _Figures, image_size: int | None, augment: bool
) -> DataSplits:
    shape = splits["train"].images.shape[1:]
    for split, arrays in splits.items():
        if arrays.images.shape[1:] != shape:
            raise DataError(f"{name}: train images are {tuple(shape)}, {split} images {tuple(arrays.images.shape[1:])}")
    check_normalisation(figures.mean, figures.std, shape[0], name)
    datasets = {
        split: ArrayDataset(
            arrays.images,
            arrays.labels,
            figures.mean,
            figures.std,
            image_size,
            augment=augment and split == "train" and shape[0] == 3,
        )
        for split, arrays in splits.items()
    }
    height, width = (shape[1], shape[2]) if image_size is None else (image_size, image_size)
    classes = 1 + max(int(arrays.labels.max()) for arrays in splits.values())
    info = DataInfo(name, classes, (len(figures.mean), height, width), figures.mean, figures.std)
    return DataSplits(datasets["train"], datasets["test"], info, datasets.get("val"))


def _folder(path: Path, figures: _Figures, image_size: int | None, augment: bool) -> DataSplits:
    if image_size is None:
        raise DataError(f"image folder {path}: images may differ in size; give image_size=, the model's side")
    if len(figures.mean) not in (1, 3):
        raise DataError(f"image folder {path}: mean has {len(figures.mean)} figures; 1 or 3 are needed")
    check_normalisation(figures.mean, figures.std, len(figures.mean), str(path))
    splits = read_folder(path, figures.mean, figures.std, image_size, augment)
    info = DataInfo(
        str(path),
        len(splits["train"].classes),
        (len(figures.mean), image_size, image_size),
        figures.mean,
        figures.std,
    )
    return DataSplits(splits["train"], splits["test"], info, splits.get("val"))
