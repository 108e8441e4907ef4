"""Which images of a calibration set the layers of a model need: what none of them would look at is not run.

`sample_patches` leaves images out of a layer's statistics where there are patches enough without them. An image that is left
out of every layer's would still be most of the work: it would run through both models to the end.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Size, Tensor

from fxprune.calibration import sampling
from fxprune.calibration.sampling import BatchPlace
from fxprune.calibration.shapes import Example
from fxprune.graph import Shape, module_of
from fxprune.statistics import HessianObserver
from fxprune.statistics.accumulators import patch_count

ALONE_SHARE = 0.125  # 8 for each column by default.


def image_step(example: Example, *, images: int, patches: int, least: int | None = None) -> Fraction:
    """The step between the images that are enough for the layer that needs most of them, at least 1.

    A classifier behind global pooling sees one patch of an image. It would take every image there is, while each of its
    patches, from an image of its own, says as much as several that are alike: beside layers that see many, it counts
    ALONE_SHARE of the patches as enough.

    Args:
        example: of a graph with observers in front of the layers that will be solved.
        images: in the whole calibration set.
        patches: for each column of a layer, see `sample_patches`.
        least: images that always take part, see there.

    Returns:
        The step; 1 too for a model that takes batches of one size only.
    """
    if not example.takes_few:
        return Fraction(1)
    ran = BatchPlace(0, 0, example.images)
    observed = ((m, shape) for n, shape in example.shapes.items() if isinstance(m := module_of(n), HessianObserver))
    seen = [(observer.geometry, _of_shape(shape)) for observer, shape in observed]
    alone = [patch_count(geometry, geometry.batched(x)) == ran.images for geometry, x in seen]
    steps = []
    for (geometry, x), one_patch in zip(seen, alone, strict=True):
        share, least_images = (ALONE_SHARE, sampling.LEAST_IMAGES) if one_patch and not all(alone) else (1.0, least)
        sample = sampling.sample_patches(
            geometry, x, ran, images=images, patches=patches, share=share, least=least_images
        )
        steps.append(sample.step)
    return min(steps, default=Fraction(1))


def _of_shape(shape: Shape) -> Tensor:
    """What a layer reads of the images that ran, without its values."""
    assert isinstance(shape, Size)
    return torch.empty(shape, device="meta")
