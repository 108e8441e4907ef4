"""Whether what a model puts out are a softmax classifier's logits: nothing else has classes to agree on, or a confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.runtime.processes import gathered

# Of trained classifiers 1e-6 to 0.03; of heads for boxes and landmarks 1 to 2, of those for independent labels 100.
SOFTMAX_SUM = 0.25
LEAST_INFORMATION = 0.5  # Of what so many classes, or images, could tell.
PROBABILITIES = 1e-3  # Within which a model's own softmax sums to 1, in half precision too.


def rows_cancel(weight: Tensor) -> bool:
    """Whether the weight (classes, D) of the layer that puts logits out bears the mark of a softmax.

    A softmax does not change if every logit grows by the same number, so that the gradients of its cross-entropy sum to zero
    over the classes, and so does what plain gradient descent adds to the weights. In ||sum of rows||^2 / sum of ||row||^2
    independent rows give 1, as those of a head that regresses numbers do. Adam's steps leave no such mark.
    """
    rows = weight.detach().double()
    return len(rows) > 1 and float(rows.sum(0).square().sum()) < SOFTMAX_SUM * float(rows.square().sum())


def log_probabilities(*outputs: Tensor) -> tuple[Tensor, ...]:
    """The logarithms of class probabilities (N, classes), in float64, of outputs of models that are alike.

    Of logits, or of their log-softmax; where the first outputs are probabilities already, of these.
    """
    first = outputs[0].double()
    sums_to_1 = ((first.sum(1) - 1).abs() < PROBABILITIES).all() and bool((first >= 0).all()) and first.shape[1] > 1
    least = torch.finfo(torch.float32).tiny
    return tuple(x.double().clamp_min(least).log() if sums_to_1 else x.double().log_softmax(1) for x in outputs)


@dataclass
class ClassInformation:
    """How much the class, taken from outputs (N, classes) as if they were logits, tells about the image.

    A classifier's softmax is sure of an image, and of others that they are something else: in nats of mutual information that
    is much. Coordinates, embeddings and scores of rare labels, taken for logits, give uniform classes or always the same.
    (Independent labels of which half are on can look like classes.)
    """

    of_class: Tensor | None = None  # Sum of p, (classes,).
    unsure: float = 0.0  # Sum of the entropies of p.
    images: int = 0

    def add(self, logs: Tensor) -> None:
        """Add images, by `log_probabilities` (N, classes)."""
        p = logs.exp()
        self.of_class = p.sum(0) if self.of_class is None else self.of_class + p.sum(0)
        self.unsure += float(torch.special.entr(p).sum())
        self.images += len(p)

    def summed(self) -> ClassInformation:
        """That of all processes together."""
        of_all = [one for one in gathered(self) if one.of_class is not None]
        counts = [one.of_class for one in of_all if one.of_class is not None]
        total = torch.stack([count.cpu() for count in counts]).sum(0) if counts else None
        return ClassInformation(total, sum(one.unsure for one in of_all), sum(one.images for one in of_all))

    @property
    def is_a_classifiers(self) -> bool:
        """Whether it is as much as a classifier's."""
        if self.of_class is None or len(self.of_class) < 2:
            return False
        images = max(1, self.images)
        information = float(torch.special.entr(self.of_class / images).sum()) - self.unsure / images
        return information > LEAST_INFORMATION * math.log(max(2, min(len(self.of_class), self.images)))
