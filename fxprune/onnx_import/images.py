"""What a file says about the images that it takes, for commands that read images from a data set."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from fxprune.errors import ModelError
from fxprune.export.onnx_file import Port, ports_of


@dataclass(frozen=True)
class ImageInput:
    """One image of a file's only input; None for what the file leaves open.

    Attributes:
        channels: how many.
        height: in pixels.
        width: in pixels.
    """

    channels: int | None
    height: int | None
    width: int | None


def image_input(path: str) -> ImageInput:
    """The images that a file takes, which are float32 with their channels first, as the data sets of this package give them.

    Raises:
        ModelError: it is no readable file, or takes something else.
    """
    try:
        inputs = ports_of(onnx.load(path, load_external_data=False))
    except Exception as error:  # OSError, protobuf's own
        raise ModelError(f"cannot read {path}: {error}") from error
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise ModelError(
            f"{path} takes {_listed(inputs)}, and a data set gives images alone; use fxprune.compile in Python"
        )
    (port,) = inputs
    sizes = [size if isinstance(size, int) and size > 0 else None for size in port.shape[1:]]
    first, _, last = sizes
    if last is not None and last <= 4 and (first is None or first > 4):
        raise ModelError(
            f"{path} takes {port}: images with their channels last, and a data set gives them first. Write the file with its "
            f"channels first (tf2onnx: --inputs-as-nchw {port.name}), or use fxprune.compile in Python on batches of "
            "images.permute(0, 2, 3, 1)"
        )
    if port.dtype != "float32":
        raise ModelError(
            f"{path} takes {port}, and a data set gives float32; use fxprune.compile in Python on batches of that type"
        )
    return ImageInput(*sizes)


def _listed(inputs: tuple[Port, ...]) -> str:
    return "; ".join(map(str, inputs)) or "nothing"
