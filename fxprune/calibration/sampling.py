"""How many images a layer's statistics are taken from.

A convolution sees thousands of patches in every image, which are much alike. Its statistics have settled long before
the last image, while a layer of many columns and few positions needs them all.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.statistics.accumulators import patch_count

LEAST_IMAGES = 128  # Patches of one image are alike; means and variances between images need their number.


@dataclass(frozen=True)
class ImageSample:
    """Every `step`-th image of a batch, from image `start`; called on a value, it leaves out the others.

    What does not have one entry for each image, as a parameter that is added to every one, is left as it is.

    Attributes:
        images: in the batch.
        dims: of the layer's input and output, (images, ...).
        step: between the images chosen.
        start: the first one.
    """

    images: int
    dims: int
    step: int = 1
    start: int = 0

    def __call__(self, value: Tensor) -> Tensor:
        """The value of the chosen images."""
        if self.step == 1 or value.dim() != self.dims or value.shape[0] != self.images:
            return value
        return value[self.start :: self.step]


def sample_images(geometry: LayerGeometry, x: Tensor, *, number: int, images: int, patches: int) -> ImageSample:
    """The images of batch `number` that a layer of a given geometry with input x is to see.

    Args:
        geometry: of the layer.
        x: its input on the batch.
        number: of the batch; successive batches start at another image.
        images: in the whole calibration set.
        patches: for each of the layer's columns, over the whole set; 0 for all there are.
    """
    size, dims = x.shape[0], x.dim()
    if not patches or geometry.batched(x) is not x:
        return ImageSample(size, dims)
    available = patch_count(geometry, x) / size * images
    step = max(1, min(size, images // LEAST_IMAGES, int(available / (patches * geometry.columns))))
    return ImageSample(size, dims, step, number % step)
