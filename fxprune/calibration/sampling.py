"""Which patches a layer's statistics are taken from.

A convolution sees thousands of patches in every image, and they are much alike: its statistics settle long before the last
patch. A layer of many columns and few positions needs all patches. Where there are more than needed, rows are left out of every
image first, since a band of rows from each of many images says more than whole images, of which there would be few.

Which images are taken is settled for the calibration set as a whole, in integers: those with the numbers floor(k step),
k = 0, 1, ... So the share is right however the set is cut into batches; a batch of at least `step` images gives at least one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.statistics.accumulators import patch_count

LEAST_IMAGES = 128  # Patches of one image are alike: how images differ is seen only in many of them.
LEAST_PATCHES = (
    49_152  # A layer of few columns needs more patches a column than one of many, and its products are cheap.
)
LEAST_STEP = Fraction(9, 8)  # To leave out fewer costs more than it saves.
STEP_PARTS = 64  # Steps are multiples of one part in so many, rounded down.
WHOLE_STEP = 3  # From here on steps are whole numbers: a slice then takes the images, without an index.
CHECK_EVERY = 4  # Of the images of a layer that sees all of them, one in so many checks what is fitted to the others.
BAND_ROWS = 4  # Of the output, at least. Kernels read beyond a band's edges, which in a thin band is most of the work.


@dataclass(frozen=True)
class BatchPlace:
    """Where a batch stands in the calibration set.

    Attributes:
        number: of batches before it.
        first: number of images before it.
        images: in it.
    """

    number: int
    first: int
    images: int


def taken_before(image: int, step: Fraction) -> int:
    """How many images are taken of those before a number."""
    return -(-image * step.denominator // step.numerator)


def images_taken(images: int, step: Fraction, *, first: int = 0, turn: int = 0) -> tuple[int, ...]:
    """Which images of a batch are taken, in the order of the set.

    Args:
        images: in the batch.
        step: between the images taken, at least 1.
        first: number of images in the batches before it.
        turn: by how many places the batch is turned: of batches that list their images in the same order, other ones are taken.
    """
    return _taken(images, step, first % step.numerator, turn % max(1, images))


@lru_cache(maxsize=256)
def _taken(images: int, step: Fraction, first: int, turn: int) -> tuple[int, ...]:
    numbers = range(taken_before(first, step), taken_before(first + images, step))
    return tuple((k * step.numerator // step.denominator - first + turn) % images for k in numbers)


@lru_cache(maxsize=256)
def as_index(images: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of images as a tensor, (n,)."""
    return torch.tensor(images, dtype=torch.long, device=device)


@dataclass(frozen=True)
class PatchSample:
    """Some images of a batch (`images_taken`), and of each a band of rows, in turn.

    Attributes:
        layer: geometry of the layer on whole images.
        images: in the batch: the first dimension of the layer's input.
        dims: of the layer's input and output, (images, ...).
        step: between the images taken, at least 1.
        first: number of images in the batches before.
        turn: by how many places the batch is turned.
        bands: into which the rows (the first spatial dimension) of the layer's output are cut; 1 for whole images.
        rows: of the output.
    """

    layer: LayerGeometry
    images: int
    dims: int
    step: Fraction = Fraction(1)
    first: int = 0
    turn: int = 0
    bands: int = 1
    rows: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return self.step == 1 and self.bands == 1

    @property
    def geometry(self) -> LayerGeometry:
        """Of the layer on what is chosen: bands come with the rows that their patches reach into, padding included."""
        return self.layer if self.bands == 1 else replace(self.layer, padding=((0, 0), *self.layer.padding[1:]))

    def output(self, value: Tensor) -> Tensor:
        """What is taken of the layer's output, or of a value that is added to it.

        What does not have one entry for each image, as a parameter that is added to every one, is left as it is.
        """
        if not self._of_images(value):
            return value
        if self.bands == 1 or value.shape[2] != self.rows:
            return self._taken(value)
        height = self.rows // self.bands
        return self._banded(value, height, height, 0)

    def input(self, x: Tensor) -> Tensor:
        """What is taken of the layer's input: the layer, in `geometry`, makes `output` of it."""
        if not self._of_images(x):
            return x
        if self.bands == 1:
            return self._taken(x)
        stride, height = self.layer.stride[0], self.rows // self.bands
        reach = self.layer.dilation[0] * (self.layer.kernel_size[0] - 1)
        return self._banded(x, stride * height, stride * (height - 1) + reach + 1, self.layer.padding[0][0])

    def _of_images(self, value: Tensor) -> bool:
        return value.dim() == self.dims and value.shape[0] == self.images

    @property
    def taken(self) -> tuple[int, ...]:
        """Numbers of the images."""
        return images_taken(self.images, self.step, first=self.first, turn=self.turn)

    def _taken(self, value: Tensor) -> Tensor:
        """The images taken, without a copy where they lie at one distance."""
        if self.step == 1:
            return value
        taken, distance = tuple(sorted(self.taken)), int(self.step)
        if self.step == distance and taken and taken == tuple(range(taken[0], self.images, distance)):
            return value[taken[0] :: distance]
        return value[as_index(taken, value.device)]

    def _banded(self, value: Tensor, distance: int, height: int, above: int) -> Tensor:
        """Of each image taken the `height` rows from its band's number times `distance`, less `above`; zeros outside."""
        images = as_index(self.taken, value.device)
        first_band = taken_before(self.first, self.step) % self.bands
        rows, outside = _rows(
            len(images), self.bands, first_band, distance, height, above, value.shape[2], value.device
        )
        found = value.movedim(1, -1)[images[:, None], rows]
        if outside is not None:
            found[outside] = 0
        return found.movedim(-1, 1)


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
    place: BatchPlace,
    *,
    images: int,
    patches: int,
    share: float = 1.0,
    least: int | None = None,
    kept: Fraction = Fraction(1),
) -> PatchSample:
    """What a layer of a given geometry with input x is to see of a batch.

    Args:
        geometry: of the layer.
        x: its input on the batch. The first dimension need not be the images, if it grows with them or stays.
        place: of the batch in the calibration set.
        images: in the whole set.
        patches: for each of the layer's columns, over the whole set; 0 for all there are, as in a set of few images.
        share: of so many patches.
        least: images that always take part, and of which there have to be so many for anything to be left out. None:
            LEAST_IMAGES, and LEAST_PATCHES of the layer's patches.
        kept: the step at which the images of the set were taken from a larger one, if they were; a layer whose step there is a
            multiple of it is given the same images as of the larger one.
    """
    size, columns = x.shape[0], patches * geometry.columns
    if least is None:
        least, columns = LEAST_IMAGES, max(columns, LEAST_PATCHES)
    if not (patches and size and place.images) or images < least or geometry.batched(x) is not x:
        return PatchSample(geometry, size, x.dim())
    too_many = Fraction(patch_count(geometry, x) * images, place.images) / (Fraction(share) * columns)
    rows, bands = 0, 1
    if geometry.kernel_size and geometry.padding_mode == "zeros" and not geometry.transposed:
        rows = geometry.output_size((x.shape[2] + sum(geometry.padding[0]), *x.shape[3:]))[0]
        bands = max([n for n in range(2, rows // BAND_ROWS + 1) if rows % n == 0 and n <= too_many], default=1)
    step = min(Fraction(images, max(1, least)), too_many / bands)
    if step < LEAST_STEP:
        step = Fraction(1)
    parts = 1 if step >= WHOLE_STEP else STEP_PARTS
    return PatchSample(
        geometry,
        size,
        x.dim(),
        step=Fraction(int(step * parts), parts),
        first=place.first * size // place.images,
        turn=0 if kept > 1 else place.number,  # What was taken was turned then.
        bands=bands,
        rows=rows,
    )
