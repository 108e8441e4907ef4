"""Picture files of any common kind: found in a folder, opened as RGB, and named where they cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from fxprune.errors import DataError

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
# ImageNet's habit: resize the short side to 256, cut 224 out of the middle.
CROP_FRACTION = 224 / 256


def find_pictures(folder: Path) -> list[Path]:
    """All picture files in a folder and the folders in it, sorted; hidden files are left aside.

    Raises:
        DataError: there are none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        inside = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"there are no pictures in the folder {folder}; it holds {inside}. Pictures end in {', '.join(EXTENSIONS)}"
        )
    return found


def open_picture(path: str | Path) -> Image.Image:
    """Open a picture as RGB: grey is repeated, transparency left out, as torchvision does; 16 bits become 8.

    Raises:
        DataError: the file is damaged, or of a kind that is not known.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
                deep = np.asarray(picture, dtype=np.int64)
                grey = Image.fromarray((deep // 256 if deep.max() > 255 else deep).astype(np.uint8))
                return grey.convert("RGB")
            rgb: Image.Image = picture.convert("RGB")
            return rgb
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture {path} cannot be read: {error}; mend it or take it out of the folder") from error


def middle(mean: tuple[float, ...], std: tuple[float, ...], image_size: int) -> v2.Compose:
    """What turns a picture into a model's input: the middle square of it, normalised; grey where `mean` has one figure."""
    return v2.Compose(
        [v2.PILToTensor(), v2.Resize(round(image_size / CROP_FRACTION)), v2.CenterCrop(image_size), *finish(mean, std)]
    )


def finish(mean: tuple[float, ...], std: tuple[float, ...]) -> list[v2.Transform]:
    """The last steps, from bytes to normalised figures."""
    grey = [v2.Grayscale()] if len(mean) == 1 else []
    return [*grey, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


class Pictures(Dataset[torch.Tensor]):
    """Pictures without labels; an item is a float32 image (C, H, W).

    Args:
        files: the pictures.
        mean: per channel, of images scaled to [0, 1]; one figure turns the images grey.
        std: per channel, same scale.
        image_size: side of the square cut out of the middle.
    """

    def __init__(self, files: list[Path], mean: tuple[float, ...], std: tuple[float, ...], image_size: int) -> None:
        self.files = files
        self._transform = middle(mean, std, image_size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Open one picture.

        Raises:
            DataError: it cannot be read.
        """
        image: torch.Tensor = self._transform(open_picture(self.files[index]))
        return image
