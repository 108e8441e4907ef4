"""Resize and Upsample: torch's interpolation where it is exactly the same, else what it amounts to along each axis.

Resizing is linear in the numbers, and each axis is done by itself. So where the sizes are known, the nearest of any
rounding is a choice of places, and linear interpolation under any convention a product with a fixed matrix.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fxprune.onnx_import.table import Operation, operator
from fxprune.onnx_import.values import Activation, Array, Known, Size

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@operator("Resize", "Upsample")
def resize(op: Operation) -> Activation:
    """To given sizes, or by given factors, along the axes behind the channels."""
    x = op.tensor()
    mode = op.attribute("mode", "nearest")
    if op.type == "Upsample" or op.opset < 11:
        convention, rounding = "asymmetric", "floor"
    else:
        convention = op.attribute("coordinate_transformation_mode", "half_pixel")
        rounding = op.attribute("nearest_mode", "round_prefer_floor")
    if op.attribute("antialias", 0) or op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        op.fail("it asks for antialias or keeps the aspect ratio; only plain resizing can be taken")
    if convention == "tf_crop_and_resize":
        op.fail("it crops while it resizes (tf_crop_and_resize)")
    sizes, scales = _wanted(op, x)
    moving = [i for i in range(x.rank) if not _same(op, x, i, sizes[i], scales[i])]
    if not moving:
        return x
    if any(axis < 2 for axis in moving) or x.rank not in _LINEAR:
        op.fail("it resizes the batch or the channels")
    known = all(isinstance(op.graph.size(x, i), int) and isinstance(sizes[i], int) for i in moving)
    if mode == "nearest":
        return _nearest(op, x, sizes, scales, moving, convention, rounding, known=known)
    if mode == "linear":
        return _linear(op, x, sizes, scales, moving, convention, known=known)
    if mode != "cubic" or op.attribute("exclude_outside", 0) or op.attribute("cubic_coeff_a", -0.75) != -0.75:
        op.fail(f"it has the mode {mode!r} with settings that torch does not have")
    if x.rank != 4 or convention not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        op.fail(
            f"cubic interpolation with coordinates {convention!r}; torch has half_pixel and align_corners, for images"
        )
    return _interpolated(op, x, "bicubic", sizes, scales, corners=convention == "align_corners")


def _wanted(op: Operation, x: Activation) -> tuple[list[Any], list[Any]]:
    """The size of each axis after it, and the factor that the file states or implies."""
    at = 1 if op.type == "Upsample" or op.opset < 11 else 2
    scales = op.numbers("scales", at)
    sizes = op.numbers("sizes", 3) if at == 2 and not scales else None
    axes = op.ints("axes")
    axes = list(range(x.rank)) if axes is None else [x.axis(axis) for axis in axes]
    before = [op.graph.size(x, i) for i in range(x.rank)]
    after, factors = list(before), list[Any]([1.0] * x.rank)
    for i, axis in enumerate(axes):
        if sizes is not None:
            fixed = sizes[i]
            # A batch size that is fixed here stays open.
            stays = isinstance(before[axis], Size) and fixed == before[axis].probes[0]
            after[axis] = before[axis] if stays else fixed
            known = isinstance(before[axis], int) and isinstance(after[axis], int)
            factors[axis] = after[axis] / before[axis] if known else None
        elif scales:
            factors[axis] = scales[i]
            if scales[i] != 1:
                size = before[axis] * scales[i]
                after[axis] = math.floor(size) if isinstance(size, float) else op.call(math.floor, size)
    return after, factors


def _same(op: Operation, x: Activation, axis: int, size: Any, scale: Any) -> bool:
    before = op.graph.size(x, axis)
    if isinstance(size, Size) and isinstance(before, Size):
        return size.probes == before.probes and (scale is None or scale == 1)
    return not isinstance(size, Size) and size == before and (scale is None or scale == 1)


def _interpolated(
    op: Operation, x: Activation, mode: str, sizes: list[Any], scales: list[Any], *, corners: bool | None
) -> Activation:
    """Torch's interpolation, by factors where they say more than the sizes."""
    after = sizes[2:]
    options: dict[str, Any] = {"mode": mode} | ({} if corners is None else {"align_corners": corners})
    by_factor = all(isinstance(s, float) for s in scales[2:])
    known = all(isinstance(op.graph.size(x, i), int) and isinstance(sizes[i], int) for i in range(2, x.rank))
    exact = known and by_factor and all(op.graph.size(x, i) * scales[i] == sizes[i] for i in range(2, x.rank))
    if by_factor and not exact:
        result: Activation = op.call(F.interpolate, x, scale_factor=[float(s) for s in scales[2:]], **options)
    else:
        result = op.call(F.interpolate, x, size=list(after), **options)
    return result


def _nearest(
    op: Operation,
    x: Activation,
    sizes: Any,
    scales: Any,
    moving: list[int],
    convention: str,
    rounding: str,
    *,
    known: bool,
) -> Activation:
    if not known:
        whole = all(isinstance(scales[i], float) and scales[i] == int(scales[i]) for i in moving)
        if (convention, rounding) == ("asymmetric", "floor") or (
            whole and _repeats(convention, rounding, scales, moving)
        ):
            return _interpolated(op, x, "nearest", sizes, scales, corners=None)
        op.fail(
            f"the size of its input is open, and torch has no nearest neighbour with coordinates {convention!r} and rounding "
            f"{rounding!r}; only asymmetric with floor"
        )
    places = {i: _places(op, x, i, sizes[i], scales[i], convention, rounding) for i in moving}
    plain = {i: np.floor(np.arange(sizes[i]) * (x.shape[i] / sizes[i])).astype(np.int64) for i in moving}
    if all((places[i] == plain[i]).all() for i in moving):
        return _interpolated(op, x, "nearest", sizes, [None] * x.rank, corners=None)
    for i in moving:
        indices = Known(places[i], f"{op.node.output[0]}_places_{i}")
        x = op.call(torch.index_select, x, i, op.graph.tensor(indices))
    return x


def _repeats(convention: str, rounding: str, scales: Any, moving: list[int]) -> bool:
    """Whether whole factors repeat each number, as torch's do, for any size."""
    for i in moving:
        factor = int(scales[i])
        steps = np.arange(4 * factor)
        coordinates = _coordinates(convention, steps, 4, 4 * factor, factor)
        if coordinates is None or (_rounded(coordinates, rounding, 4) != steps // factor).any():
            return False
    return convention != "align_corners"


def _places(op: Operation, x: Activation, axis: int, size: int, scale: float, convention: str, rounding: str) -> Array:
    coordinates = _coordinates(convention, np.arange(size), x.shape[axis], size, scale)
    if coordinates is None:
        op.fail(f"it has coordinates of the kind {convention!r}")
    return _rounded(coordinates, rounding, x.shape[axis])


def _rounded(coordinates: Array, rounding: str, size: int) -> Array:
    found = {
        "floor": np.floor(coordinates),
        "ceil": np.ceil(coordinates),
        "round_prefer_floor": np.ceil(coordinates - 0.5),
        "round_prefer_ceil": np.floor(coordinates + 0.5),
    }[rounding]
    clipped: Array = np.clip(found, 0, size - 1).astype(np.int64)
    return clipped


def _coordinates(convention: str, i: Array, before: int, after: int, scale: float) -> Array | None:
    """Where in the input each position of the output lies; None for a convention that is not known. In float32, as engines."""
    i, scale32 = i.astype(np.float32), np.float32(scale)
    half: Array = (i + np.float32(0.5)) / scale32 - np.float32(0.5)
    match convention:
        case "asymmetric":
            return np.asarray(i / scale32)
        case "half_pixel":
            return half
        case "pytorch_half_pixel":
            return half if after > 1 else np.zeros_like(i)
        case "align_corners":
            return np.asarray(i * np.float32(before - 1) / np.float32(after - 1)) if after > 1 else np.zeros_like(i)
        case "half_pixel_symmetric":
            share = np.float32(after) / (scale32 * np.float32(before))
            offset = np.float32(before / 2) * (np.float32(1) - share)
            return np.asarray(offset + (i + np.float32(0.5)) / scale32 - np.float32(0.5))
    return None


def _linear(
    op: Operation, x: Activation, sizes: Any, scales: Any, moving: list[int], convention: str, *, known: bool
) -> Activation:
    if convention in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        # With one position in the output, pytorch_half_pixel takes the first of the input, torch the middle.
        single = convention == "pytorch_half_pixel" and any(isinstance(sizes[i], int) and sizes[i] == 1 for i in moving)
        if not single:
            return _interpolated(op, x, _LINEAR[x.rank], sizes, scales, corners=convention == "align_corners")
    if not known:
        op.fail(f"the size of its input is open, and torch has no linear interpolation with coordinates {convention!r}")
    for i in moving:
        coordinates = _coordinates(convention, np.arange(sizes[i]), x.shape[i], sizes[i], scales[i])
        if coordinates is None:
            op.fail(f"it has coordinates of the kind {convention!r}")
        matrix = _interpolation(coordinates, x.shape[i]).astype(_numpy(x))
        held = op.graph.tensor(Known(matrix, f"{op.node.output[0]}_weights_{i}"))
        moved = x if i == x.rank - 1 else op.method("transpose", x, i, -1)
        made = op.call(torch.matmul, moved, held)
        x = made if i == x.rank - 1 else op.method("transpose", made, i, -1)
    return x


def _interpolation(coordinates: Array, size: int) -> Array:
    """The matrix (before, after) of linear interpolation at these coordinates."""
    clipped = np.clip(coordinates, 0, size - 1)
    low = np.floor(clipped).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    share = clipped - low
    matrix = np.zeros((size, len(clipped)))
    columns = np.arange(len(clipped))
    np.add.at(matrix, (low, columns), 1 - share)
    np.add.at(matrix, (high, columns), share)
    return matrix


def _numpy(x: Activation) -> Any:
    return {torch.float16: np.float16, torch.float64: np.float64}.get(x.probes[0].dtype, np.float32)
