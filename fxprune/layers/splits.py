"""The two layers that stand in for one: which splits a layer has, what they cost, and the modules themselves.

channel: the layer's own kernel to r channels, then 1 x 1 (for Linear: two Linear layers).
spatial: ky x 1 to r channels, then 1 x kx.

Only the second of the two has a bias: padding puts zeros around the channels in between, as around the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.fx import Node

from fxprune.errors import OptionsError
from fxprune.geometry import LayerGeometry, MatrixLayer
from fxprune.graph import input_of

Split = Literal["channel", "spatial"]
SPLITS: tuple[Split, ...] = ("channel", "spatial")


def splits_of(split: Split | Literal["auto"]) -> tuple[Split, ...]:
    """The splits that "channel", "spatial" or "auto" allows.

    Raises:
        OptionsError: for anything else.
    """
    if split == "auto":
        return SPLITS
    if split not in SPLITS:
        raise OptionsError(f"split is {split!r}; it should be 'channel', 'spatial' or 'auto'")
    return (split,)


def full_rank(geometry: LayerGeometry, split: Split) -> int:
    """Largest rank of a split; 0 if the layer has no such split."""
    if geometry.groups > 1 or geometry.transposed:
        return 0
    if split == "channel":
        return min(geometry.rows, geometry.columns)
    if len(geometry.kernel_size) != 2 or min(geometry.kernel_size) < 2:
        return 0
    ky, kx = geometry.kernel_size
    return min(ky * geometry.in_channels, kx * geometry.out_channels)


def dense_macs(geometry: LayerGeometry, input_shape: Sequence[int]) -> int:
    """MACs of a layer for one sample; `input_shape` with the batch dimension."""
    return _positions(geometry, input_shape) * geometry.out_channels * geometry.columns


def factored_macs(geometry: LayerGeometry, input_shape: Sequence[int], split: Split, rank: int) -> int:
    """MACs of the two layers for one sample; `input_shape` with the batch dimension."""
    positions = _positions(geometry, input_shape)
    if split == "channel":
        return positions * rank * (geometry.columns + geometry.out_channels)
    (ky, kx), width = geometry.kernel_size, input_shape[-1]
    out_height = geometry.output_size(_padded(geometry, input_shape))[0]
    return rank * (out_height * width * ky * geometry.in_channels + positions * kx * geometry.out_channels)


def geometries(geometry: LayerGeometry, split: Split, rank: int) -> tuple[LayerGeometry, LayerGeometry]:
    """How the two layers read their inputs."""
    if not geometry.kernel_size:
        return LayerGeometry(geometry.in_channels, rank), LayerGeometry(rank, geometry.out_channels)
    if split == "channel":
        dims = len(geometry.kernel_size)
        ones, nothing = (1,) * dims, ((0, 0),) * dims
        second = LayerGeometry(rank, geometry.out_channels, ones, ones, nothing, ones, 1, geometry.padding_mode)
        return replace(geometry, out_channels=rank), second
    down = _on_axis(replace(geometry, out_channels=rank), 0)
    return down, _on_axis(replace(geometry, in_channels=rank), 1)


def _on_axis(geometry: LayerGeometry, axis: int) -> LayerGeometry:
    """Kernel, stride, padding and dilation of a 2-D geometry on one axis only."""

    def only(values: tuple[Any, ...], neutral: Any) -> tuple[Any, ...]:
        return tuple(value if i == axis else neutral for i, value in enumerate(values))

    return replace(
        geometry,
        kernel_size=only(geometry.kernel_size, 1),
        stride=only(geometry.stride, 1),
        padding=only(geometry.padding, (0, 0)),
        dilation=only(geometry.dilation, 1),
    )


def two_layers(module: MatrixLayer, split: Split, rank: int, *, bias: bool) -> nn.Sequential:
    """The two layers with torch's initial weights."""
    like: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, rank, bias=False, **like)
        return nn.Sequential(first, nn.Linear(rank, module.out_features, bias=bias, **like))
    make: Any = type(module)
    size, channels = module.kernel_size, (module.in_channels, module.out_channels)
    reads: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    like["padding_mode"] = module.padding_mode
    if split == "channel":
        first = make(channels[0], rank, size, bias=False, **reads, **like)
        return nn.Sequential(first, make(rank, channels[1], 1, bias=bias, **like))
    down = make(channels[0], rank, (size[0], 1), bias=False, **_along(reads, 0), **like)
    return nn.Sequential(down, make(rank, channels[1], (1, size[1]), bias=bias, **_along(reads, 1), **like))


def split_call(node: Node) -> Node:
    """Put calls of `name.0` and `name.1` in front of the call of a module `name`; the second takes over its users."""
    graph = node.graph
    with graph.inserting_before(node):
        first = graph.call_module(f"{node.target}.0", (input_of(node),))
        second = graph.call_module(f"{node.target}.1", (first,))
    node.replace_all_uses_with(second)
    return second


def _along(reads: dict[str, Any], axis: int) -> dict[str, Any]:
    """Stride, padding and dilation of a 2-D convolution on one axis only; "same" and "valid" hold for each axis."""
    neutral = {"stride": 1, "padding": 0, "dilation": 1}
    return {
        key: value if isinstance(value, str) else tuple(v if i == axis else neutral[key] for i, v in enumerate(value))
        for key, value in reads.items()
    }


def _padded(geometry: LayerGeometry, input_shape: Sequence[int]) -> tuple[int, ...]:
    spatial = input_shape[-len(geometry.padding) :]
    return tuple(size + sum(sides) for size, sides in zip(spatial, geometry.padding, strict=True))


def _positions(geometry: LayerGeometry, input_shape: Sequence[int]) -> int:
    """Output positions of one sample."""
    if not geometry.kernel_size:
        return math.prod(input_shape[1:-1])
    return math.prod(geometry.output_size(_padded(geometry, input_shape)))
