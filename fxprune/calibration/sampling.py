"""Which patches a layer's statistics are taken from.

A convolution sees thousands of patches in every image, which are much alike. Its statistics have settled long before the
last one, while a layer of many columns and few positions needs them all. What is left out is left out of every image first:
a band of rows of each of many images says more than as many rows of a few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.statistics.accumulators import patch_count

LEAST_IMAGES = 128  # Patches of one image are alike; means and variances between images need their number.
LEAST_PATCHES = 49_152  # A layer of few columns needs more for each than a layer of many, and its products cost little.
LEAST_STEP = 1.25  # To leave out fewer costs more than it saves.
WHOLE_STEP = 3.0  # From here on steps are whole: such images can be had without an index.
BAND_ROWS = 4  # Of the output, at least: a kernel reads beyond the band, and thin bands are mostly such margins.


@dataclass(frozen=True)
class PatchSample:
    """Every `step`-th image of a batch, from image `start`, rounded down, and of each a band of rows, in turn.

    Attributes:
        layer: geometry of the layer on whole images.
        images: in the batch.
        dims: of the layer's input and output, (images, ...).
        step: between the images chosen, at least 1.
        start: the first one, below `step`.
        bands: into which the rows (the first spatial dimension) of the layer's output are cut; 1 for whole images.
        rows: of the output.
        first_band: of the first image chosen.
    """

    layer: LayerGeometry
    images: int
    dims: int
    step: float = 1.0
    start: float = 0.0
    bands: int = 1
    rows: int = 0
    first_band: int = 0

    @property
    def geometry(self) -> LayerGeometry:
        """Of the layer on what is chosen: bands come with the rows that their patches reach into, padding included."""
        return self.layer if self.bands == 1 else replace(self.layer, padding=((0, 0), *self.layer.padding[1:]))

    def output(self, value: Tensor) -> Tensor:
        """What is chosen of the layer's output, or of a value that is added to it.

        What does not have one entry for each image, as a parameter that is added to every one, is left as it is.
        """
        if not self._of_images(value):
            return value
        if self.bands == 1 or value.shape[2] != self.rows:
            return self._chosen(value)
        height = self.rows // self.bands
        return self._banded(value, height, height, 0)

    def input(self, x: Tensor) -> Tensor:
        """What is chosen of the layer's input: the layer, in `geometry`, makes `output` of it."""
        if not self._of_images(x):
            return x
        if self.bands == 1:
            return self._chosen(x)
        stride, height = self.layer.stride[0], self.rows // self.bands
        reach = self.layer.dilation[0] * (self.layer.kernel_size[0] - 1)
        return self._banded(x, stride * height, stride * (height - 1) + reach + 1, self.layer.padding[0][0])

    def _of_images(self, value: Tensor) -> bool:
        return value.dim() == self.dims and value.shape[0] == self.images

    def _chosen(self, value: Tensor) -> Tensor:
        """The images chosen."""
        if self.step == 1:
            return value
        if self.step % 1 == 0:
            return value[int(self.start) :: int(self.step)]
        return value[chosen_images(self.images, self.step, self.start, value.device)]

    def _banded(self, value: Tensor, distance: int, height: int, above: int) -> Tensor:
        """Of each image chosen the `height` rows from its band's number times `distance`, less `above`; zeros outside."""
        images = chosen_images(self.images, self.step, self.start, value.device)
        rows, outside = _rows(
            len(images), self.bands, self.first_band, distance, height, above, value.shape[2], value.device
        )
        found = value.movedim(1, -1)[images[:, None], rows]
        if outside is not None:
            found[outside] = 0
        return found.movedim(-1, 1)


@lru_cache(maxsize=256)
def chosen_images(images: int, step: float, start: float, device: torch.device) -> Tensor:
    """Numbers of every `step`-th image of a batch, rounded down, (n,)."""
    return torch.arange(start, images, step).long().to(device)


@lru_cache(maxsize=256)
def _rows(
    images: int, bands: int, first_band: int, distance: int, height: int, above: int, size: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Numbers of the rows of each image, (n, height), kept inside [0, size); and which of them were not, if any."""
    band = (torch.arange(images) + first_band) % bands
    rows = (band * distance - above)[:, None] + torch.arange(height)
    outside = tuple(index.to(device) for index in ((rows < 0) | (rows >= size)).nonzero(as_tuple=True))
    return rows.clamp(0, size - 1).to(device), outside if len(outside[0]) else None


def sample_patches(
    geometry: LayerGeometry,
    x: Tensor,
    *,
    number: int,
    images: int,
    patches: int,
    share: float = 1.0,
    least: int | None = None,
    kept: float = 1.0,
) -> PatchSample:
    """What a layer of a given geometry with input x is to see of batch `number`.

    Args:
        geometry: of the layer.
        x: its input on the batch.
        number: of the batch; successive batches start at another image and another band.
        images: in the whole calibration set.
        patches: for each of the layer's columns, over the whole set; 0 for all there are, as in a set of few images.
        share: of so many patches.
        least: images that always take part, and of which there have to be so many for anything to be left out. None:
            LEAST_IMAGES, and LEAST_PATCHES of the layer's patches.
        kept: of every how many images of a batch, from `number % kept` on, one is in x; a layer whose step is a multiple of
            this is given the same images whether the others are there or not.
    """
    size, wanted = x.shape[0], share * patches * geometry.columns
    if least is None:
        least, wanted = LEAST_IMAGES, max(wanted, share * LEAST_PATCHES)
    if not patches or images < least or geometry.batched(x) is not x:
        return PatchSample(geometry, size, x.dim())
    too_many = patch_count(geometry, x) / size * images / wanted
    rows, bands = 0, 1
    if geometry.kernel_size and geometry.padding_mode == "zeros":
        rows = geometry.output_size((x.shape[2] + sum(geometry.padding[0]), *x.shape[3:]))[0]
        bands = max([n for n in range(2, rows // BAND_ROWS + 1) if rows % n == 0 and n <= too_many], default=1)
    step = min(float(size), images / least, too_many / bands)
    if step < LEAST_STEP:
        step = 1.0
    if step >= WHOLE_STEP:
        step //= 1.0
    return PatchSample(geometry, size, x.dim(), step, number / kept % step, bands, rows, number % bands)
