"""Mixtures of two images: inputs that no layer was fitted to, made of calibration images.

A mixture 0.7 x + 0.3 x' (Zhang et al. 2018, mixup) lies between what a model was trained on. Both models see it for the
first time, and the dense one is about as unsure of it as of new images. On ResNet-20 and ResNet-56, at 2:4 and 1:4 and from 64
images on, the scale of the logits that is best on mixtures is within a few percent of KL of the best one for test images. On
the calibration images themselves, mirrored or shifted, it is not: too little goes wrong there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.calibration.batches import map_tensors, tensors_in
from fxprune.calibration.sampling import CHECK_EVERY, BatchPlace

SHARE = (
    0.7  # Of the first image. 0.8 changes too little; with half of a patch cut out and replaced, results are the same.
)
COUNT = 128  # Mixtures, about: an eighth of a set of 1,024 images.


@dataclass(frozen=True)
class Mixing:
    """Which mixtures are made of a set: each check image (`CHECK_EVERY`), or every so many, with its next few neighbours.

    Attributes:
        every: of the check images, every so many is taken.
        partners: of each.
    """

    every: int
    partners: int

    @staticmethod
    def of(images: int) -> Mixing:
        """For a set of so many images that are fitted."""
        checks = max(1, -(-images // CHECK_EVERY))
        return Mixing(-(-checks // COUNT), -(-COUNT // checks))

    def mixtures(self, values: dict[Node, Any], place: BatchPlace) -> dict[Node, Any] | None:
        """The mixtures of a batch's images, or None: of a single image, or of what is not floating point.

        Partners come from the same batch, so that a set gives the same mixtures however many processes share it.

        Args:
            values: of the graph's inputs.
            place: of the batch in the set.
        """
        images, given = place.images, list(tensors_in(list(values.values())))
        of_images = [x for x in given if x.dim() and len(x) == images]
        every = CHECK_EVERY * self.every
        first = torch.arange(-place.first % every, images, every)
        if images < 2 or not len(first) or not of_images or not all(x.is_floating_point() for x in of_images):
            return None
        offsets = torch.arange(1, min(self.partners, images - 1) + 1)
        second = ((first[:, None] + offsets) % images).flatten()
        first = first.repeat_interleave(len(offsets))

        def mixed(x: Tensor) -> Tensor:
            if not x.dim() or len(x) != images:
                return x
            return torch.lerp(x[second.to(x.device)], x[first.to(x.device)], SHARE)

        found: dict[Node, Any] = map_tensors(values, mixed)
        return found
