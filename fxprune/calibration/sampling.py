"""How many images a layer's statistics are taken from.

A convolution sees thousands of patches in every image, which are much alike. Its statistics have settled long before
the last image, while a layer of many columns and few positions needs them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.statistics.accumulators import patch_count

LEAST_IMAGES = 128  # Patches of one image are alike; means and variances between images need their number.
LEAST_STEP = 1.25  # To leave out fewer costs more than it saves.
WHOLE_STEP = 3.0  # From here on steps are whole: such images can be had without an index.


@dataclass(frozen=True)
class ImageSample:
    """Every `step`-th image of a batch, from image `start`, rounded down; called on a value, it leaves out the others.

    What does not have one entry for each image, as a parameter that is added to every one, is left as it is.

    Attributes:
        images: in the batch.
        dims: of the layer's input and output, (images, ...).
        step: between the images chosen, at least 1.
        start: the first one, below `step`.
    """

    images: int
    dims: int
    step: float = 1.0
    start: float = 0.0

    def __call__(self, value: Tensor) -> Tensor:
        """The value of the chosen images."""
        if self.step == 1 or value.dim() != self.dims or value.shape[0] != self.images:
            return value
        if self.step % 1 == 0:
            return value[int(self.start) :: int(self.step)]
        return value[torch.arange(self.start, self.images, self.step, device=value.device).long()]


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
    step = min(float(size), images / LEAST_IMAGES, available / (patches * geometry.columns))
    if step < LEAST_STEP:
        return ImageSample(size, dims)
    if step >= WHOLE_STEP:
        step //= 1.0
    return ImageSample(size, dims, step, number % step)
