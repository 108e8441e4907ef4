"""Image folders: one subfolder a split, and in it one subfolder a class."""

from __future__ import annotations

import copy
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fxprune.data.pictures import finish, middle, open_picture
from fxprune.errors import DataError


class FolderDataset(ImageFolder):  # type: ignore[misc]
    """torchvision's ImageFolder that can give its images without augmentation.

    Args:
        root: folder with one subfolder a class.
        mean: per channel, of images scaled to [0, 1]; one figure turns the images grey.
        std: per channel, same scale.
        image_size: side of the square cut out of the middle.
        augment: crop a random part and mirror at random instead.
    """

    def __init__(
        self, root: Path, mean: tuple[float, ...], std: tuple[float, ...], image_size: int, augment: bool
    ) -> None:
        self._plain = middle(mean, std, image_size)
        part = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
        augmented = v2.Compose([v2.PILToTensor(), *part, *finish(mean, std)])
        super().__init__(str(root), transform=augmented if augment else self._plain, loader=open_picture)

    def plain(self) -> FolderDataset:
        """Return the same images without augmentation."""
        other = copy.copy(self)
        other.transform = self._plain
        return other


def read_folder(
    path: Path, mean: tuple[float, ...], std: tuple[float, ...], image_size: int, augment: bool
) -> dict[str, FolderDataset]:
    """Read a folder that holds train/ and test/, or train/ and val/, each with one subfolder a class.

    Args:
        path: the folder.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, same scale.
        image_size: side of the images that the model sees.
        augment: for the training split.

    Returns:
        The splits found among train, val and test; where there is no test/, val/ stands for it.

    Raises:
        DataError: a split is missing or empty, or the splits' classes differ.
    """
    found = [split for split in ("train", "val", "test") if (path / split).is_dir()]
    if "train" not in found or len(found) < 2:
        inside = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise DataError(f"image folder {path} needs train/ and test/ (or val/); it holds {inside}")
    splits = {}
    for split in found:
        try:
            splits[split] = FolderDataset(path / split, mean, std, image_size, augment and split == "train")
        except FileNotFoundError as error:
            raise DataError(f"image folder {path / split} cannot be read: {error}") from error
        if splits[split].classes != splits["train"].classes:
            odd = sorted(set(splits[split].classes) ^ set(splits["train"].classes))
            raise DataError(f"image folder {path}: train/ and {split}/ differ in classes {', '.join(odd[:5])}")
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    return splits
