"""A data set by its name or its path, split, normalised and described."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from fxprune.data.array_dataset import ArrayDataset, Arrays, check_normalisation
from fxprune.data.image_arrays import is_normalised
from fxprune.data.image_folder import read_folder
from fxprune.data.named import NAMED, read_named
from fxprune.data.npz_files import has_labels, holds_jpeg, read_npz, read_unlabelled, splits_of
from fxprune.data.pictures import Pictures, find_pictures
from fxprune.data.sampling import calibration_split
from fxprune.errors import DataError, DataWarning

DEFAULT_ROOT = Path.home() / ".cache" / "fxprune" / "data"


@dataclass(frozen=True)
class DataInfo:
    """Describes the images that a loaded data set gives.

    Attributes:
        name: the name or path that it was asked for by.
        num_classes: classes, counted from 0; 0 where there are no labels.
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
    """A data set's splits; each item is (float32 image (C, H, W), int label), or the image alone where there are no labels.

    Attributes:
        train: the training split, augmented where asked for.
        test: the test split; None where images without labels are not split.
        info: what the images are.
        val: the validation split, where the data set has one of its own.
    """

    train: Dataset[Any]
    test: Dataset[Any] | None
    info: DataInfo
    val: Dataset[Any] | None = None

    def with_validation(self, share: float, seed: int = 0) -> DataSplits:
        """The same, with a share of the training images as validation images where there are none yet.

        The classes are as even among them as the data allows; they are not augmented.
        """
        count = round(share * len(self.train))  # type: ignore[arg-type]
        if self.val is not None or count < 1:
            return self
        val, rest = calibration_split(self.train, count, seed, balanced=self.labelled)
        return replace(self, train=Subset(self.train, rest.indices), val=val)

    @property
    def labelled(self) -> bool:
        """Whether accuracy can be measured."""
        return self.info.num_classes > 0


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
    labelled: bool = True,
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
        labelled: labels are needed. If not, images alone will do: a folder of pictures, however deep; an .npy file; an
            .npz file whose images are `images`, or its only array of three or four dimensions. Labels that are there are
            still read.

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
        figures = _figures(name, mean, std)
        if not labelled and not _has_labels(path):
            return _pictures(path, figures, image_size)
        return _folder(path, figures, image_size, augment)
    if path.suffix in (".npz", ".npy"):
        splits = _npz_splits(path) if labelled or _has_labels(path) else read_unlabelled(path)
        if any(is_normalised(arrays.images) for arrays in splits.values()):
            figures = _none_needed(path, splits)
        else:
            figures = _figures(name, mean, std)
        return _in_memory(name, splits, figures, image_size, augment)
    close = difflib.get_close_matches(name, NAMED, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(list_data())}"
    raise DataError(f"{name!r} is neither a known data set, nor a folder, nor an .npz or .npy file; {hint}")


@dataclass(frozen=True)
class _Figures:
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _figures(name: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> _Figures:
    if mean is None or std is None:
        raise DataError(
            f"{name}: mean= and std= are needed, both (--mean and --std, once for each channel): the figures that the "
            "model was trained with; fxprune.models.model_info(name) has them for models that are known by name"
        )
    return _Figures(tuple(mean), tuple(std))


def _none_needed(path: Path, splits: Mapping[str, Arrays]) -> _Figures:
    """The normalisation of images that are normalised already."""
    low = min(float(arrays.images.min()) for arrays in splits.values())
    high = max(float(arrays.images.max()) for arrays in splits.values())
    warnings.warn(
        f"{path} holds values from {low:.3g} to {high:.3g}: they are taken as normalised already, without mean and std",
        DataWarning,
        stacklevel=3,
    )
    channels = splits["train"].images.shape[1]
    return _Figures((0.0,) * channels, (1.0,) * channels)


def _has_labels(path: Path) -> bool:
    """Whether a folder or an .npz file has all that a labelled data set needs, in its names at least."""
    if path.is_dir():
        tested = [path / split for split in ("test", "val") if (path / split).is_dir()]
        return bool(tested) and all(
            folder.is_dir() and any(item.is_dir() for item in folder.iterdir()) for folder in (path / "train", *tested)
        )
    if path.suffix == ".npy":
        return False
    if holds_jpeg(path):
        return len(_jpeg_pair(path)) == 2
    return has_labels(path)


def _npz_splits(path: Path) -> dict[str, Arrays]:
    if path.suffix == ".npy":
        raise DataError(
            f"{path} holds images without labels; fxprune prune, low-rank, scan and evaluate --against can use them"
        )
    if not holds_jpeg(path):
        found = splits_of(path)
        wanted = found if {"train", "test"} <= set(found) else ("train", "test")
        return {split: arrays for split, arrays in read_npz(path, wanted).items() if split is not None}
    files = _jpeg_pair(path)
    if len(files) < 2:
        raise DataError(
            f"{path} holds one split as JPEGs; load_data needs *_train.npz and *_test.npz side by side; "
            "fxprune.data.load_npz loads one split alone"
        )
    return {split: read_npz(file, (None,))[None] for split, file in files.items()}


def _jpeg_pair(path: Path) -> dict[str, Path]:
    """The files of the training and the test split beside each other; {} where one is missing."""
    files = {}
    for split, other in (("train", "test"), ("test", "train")):
        stem = path.stem.removesuffix(f"_{other}") + f"_{split}" if path.stem.endswith(f"_{other}") else path.stem
        files[split] = path.with_name(f"{stem}.npz")
    return files if files["train"] != files["test"] and all(file.is_file() for file in files.values()) else {}


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
    classes = max((1 + int(arrays.labels.max()) for arrays in splits.values() if arrays.labels is not None), default=0)
    info = DataInfo(name, classes, (len(figures.mean), height, width), figures.mean, figures.std)
    return DataSplits(datasets["train"], datasets.get("test"), info, datasets.get("val"))


def _pictures(path: Path, figures: _Figures, image_size: int | None) -> DataSplits:
    """A folder of pictures without labels; those in train/ and in test/ (or val/) apart, where it has such folders."""
    side = _side(path, figures, image_size)
    folders = {"train": path}
    if (path / "train").is_dir():
        tested = [path / split for split in ("test", "val") if (path / split).is_dir()]
        folders = {"train": path / "train"} | ({"test": tested[0]} if tested else {})
    found = {
        split: Pictures(find_pictures(folder), figures.mean, figures.std, side) for split, folder in folders.items()
    }
    info = DataInfo(str(path), 0, (len(figures.mean), side, side), figures.mean, figures.std)
    return DataSplits(found["train"], found.get("test"), info)


def _side(path: Path, figures: _Figures, image_size: int | None) -> int:
    """The side of a folder's images, once it is known to make sense with the normalisation."""
    if image_size is None:
        raise DataError(
            f"image folder {path}: images may differ in size; give image_size= (--image-size), the model's side"
        )
    if len(figures.mean) not in (1, 3):
        raise DataError(f"image folder {path}: mean has {len(figures.mean)} figures; 1 or 3 are needed")
    check_normalisation(figures.mean, figures.std, len(figures.mean), str(path))
    return image_size


def _folder(path: Path, figures: _Figures, image_size: int | None, augment: bool) -> DataSplits:
    side = _side(path, figures, image_size)
    splits = read_folder(path, figures.mean, figures.std, side, augment)
    shape = (len(figures.mean), side, side)
    info = DataInfo(str(path), len(splits["train"].classes), shape, figures.mean, figures.std)
    return DataSplits(splits["train"], splits["test"], info, splits.get("val"))
