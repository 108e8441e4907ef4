"""Which images of a calibration set the layers of a model need. An image that no layer needs is not run.

`sample_patches` leaves images out of a layer's statistics where there are enough patches without them. Taking an image's
statistics is little work beside running it through both models, so an image that every layer leaves out is best not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Size, Tensor
from torch.fx import GraphModule, Node

from fxprune.calibration import sampling
from fxprune.calibration.batches import count, map_tensors, take
from fxprune.calibration.failures import stays_as_it_is
from fxprune.calibration.observers import observers_off
from fxprune.calibration.sampling import BatchPlace
from fxprune.graph import Shape, module_of, value_shapes
from fxprune.statistics import HessianObserver
from fxprune.statistics.accumulators import patch_count

DRY_RUN_IMAGES = 4
ALONE_SHARE = 0.125  # 8 for each column by default.


def image_step(
    graph_module: GraphModule, inputs: Mapping[Node, Any], *, images: int, patches: int, least: int | None = None
) -> Fraction:
    """The step between images, at least 1, that leaves enough of them for the layer that needs most.

    A classifier behind global pooling sees one patch of an image, and by the rule for other layers would take every image
    there is. But its patches come from different images, and each says as much as several patches of one image: where other
    layers see many patches, ALONE_SHARE of the usual number is enough for it.

    Args:
        graph_module: with observers in front of the layers that will be solved.
        inputs: values of its placeholders in one batch; a few of the images run through the graph.
        images: in the whole calibration set.
        patches: for each column of a layer, see `sample_patches`.
        least: images that always take part, see there.

    Returns:
        The step; 1 too for a model that does not run on a few images of a batch, as it may take batches of one size only.
    """
    observers = {n: m for n in graph_module.graph.nodes if isinstance(m := module_of(n), HessianObserver)}
    shapes = _shapes_of_a_few(graph_module, inputs)
    if shapes is None:
        return Fraction(1)
    ran = BatchPlace(0, 0, min(DRY_RUN_IMAGES, count(inputs)))
    seen = [(observer.geometry, _of_shape(shapes[node])) for node, observer in observers.items()]
    alone = [patch_count(geometry, geometry.batched(x)) == ran.images for geometry, x in seen]
    steps = []
    for (geometry, x), one_patch in zip(seen, alone, strict=True):
        share, least_images = (ALONE_SHARE, sampling.LEAST_IMAGES) if one_patch and not all(alone) else (1.0, least)
        sample = sampling.sample_patches(
            geometry, x, ran, images=images, patches=patches, share=share, least=least_images
        )
        steps.append(sample.step)
    return min(steps, default=Fraction(1))


def runs_on_a_few(graph_module: GraphModule, inputs: Mapping[Node, Any]) -> bool:
    """Whether a graph takes fewer images than a batch holds."""
    return _shapes_of_a_few(graph_module, inputs) is not None


def _shapes_of_a_few(graph_module: GraphModule, inputs: Mapping[Node, Any]) -> dict[Node, Shape] | None:
    """The shapes of all values on a few images; None for a model that does not run on them."""
    few = map_tensors(take(list(inputs.values()), slice(DRY_RUN_IMAGES)), torch.clone)
    try:
        with observers_off(graph_module):
            return value_shapes(graph_module, *few)
    except Exception as error:  # Whatever it is: the run on the whole batch names the place, or succeeds.
        if stays_as_it_is(error):
            raise
        return None


def _of_shape(shape: Shape) -> Tensor:
    """What a layer reads of the images that ran, without its values."""
    assert isinstance(shape, Size)
    return torch.empty(shape, device="meta")
