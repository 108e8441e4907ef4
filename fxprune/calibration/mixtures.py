"""Mixtures of two images: inputs that no layer was fitted to, made of calibration images.

The longest side of an image is cut, and the rest of another one put in (Yun et al. 2019, CutMix). Both models see such an image
for the first time, its values are what images have, and the dense model is about as unsure of it as of new images. On
ResNet-20 and ResNet-56, at 2:4 and 1:4 and from 64 images on, the scale of the logits that is best on mixtures is within a few
percent of KL of the best one for test images. On the calibration images themselves, mirrored or shifted, it is not: too little
goes wrong there. Weighted means of two images (mixup) do as well there, but have less contrast, which misled on noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.calibration.batches import map_tensors, tensors_in
from fxprune.calibration.sampling import CHECK_EVERY, BatchPlace

SHARE = 0.7  # Of the first image. 0.5 does as well on CIFAR ResNets, and finds a worse scale for EfficientNet-Lite1.
COUNT = 64  # Mixtures, about. 128 gave no better scale, for 10 classes or 1,000; 32 were misled by noise.


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
        """The mixtures of a batch's images, or None: of a single image, or without a side that can be cut.

        Partners come from the same batch, so that a set gives the same mixtures however many processes share it.

        Args:
            values: of the graph's inputs. Tensors with as many entries as there are images are mixed, those of one number
                an image being the first one's; others stay.
            place: of the batch in the set.
        """
        images = place.images
        every = CHECK_EVERY * self.every
        first = torch.tensor(range(-place.first % every, images, every), dtype=torch.int64)
        given = list(tensors_in(list(values.values())))
        if (
            images < 2
            or not len(first)
            or not any(x.dim() > 1 and len(x) == images and x[0].numel() > 1 for x in given)
        ):
            return None
        offsets = torch.arange(1, min(self.partners, images - 1) + 1)
        second = ((first[:, None] + offsets) % images).flatten()
        first = first.repeat_interleave(len(offsets))

        def mixed(x: Tensor) -> Tensor:
            return _cut(x[first.to(x.device)], x[second.to(x.device)]) if x.dim() and len(x) == images else x

        found: dict[Node, Any] = map_tensors(values, mixed)
        return found


def _cut(one: Tensor, other: Tensor) -> Tensor:
    """The first SHARE of each image's longest side, and the rest of another's; overwrites the first, (N, ...)."""
    if one.dim() > 1:
        sides = list(one.shape[1:])
        longest = max(sides)
        dim, kept = 1 + sides.index(longest), round(SHARE * longest)
        one.narrow(dim, kept, longest - kept).copy_(other.narrow(dim, kept, longest - kept))
    return one
