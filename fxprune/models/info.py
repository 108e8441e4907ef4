"""What is known about a model before it is built."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelInfo:
    """Defaults of one named model.

    Attributes:
        name: the name that ``create`` knows it by.
        input_shape: (channels, height, width) of one input image.
        num_classes: width of the output when ``create`` is not told otherwise.
        mean: per-channel mean that inputs, scaled to [0, 1], are normalised with.
        std: per-channel standard deviation, same scale.
        source: the paper or package that the model comes from.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = ""
