"""Which images of a calibration set the layers of a model need. An image that no layer needs is not run.

`sample_patches` leaves images out of a layer's statistics where there are enough patches without them. Taking an image's
statistics is little work beside running it through both models, so an image that every layer leaves out is best not run.
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
    """The step between images, at least 1, that leaves enough of them for the layer that needs most.

    A classifier behind global pooling sees one patch of an image, and by the rule for other layers would take every image
    there is. But its patches come from different images, and each says as much as several patches of one image: where other
    layers see many patches, ALONE_SHARE of the usual number is enough for it.

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
