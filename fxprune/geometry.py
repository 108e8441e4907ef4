"""How a convolution or a linear layer reads its input, written as one matrix product per group.

Everywhere in fxprune a weight is seen as G matrices of R/G rows and D columns, and the columns are ordered
(kernel positions, input channels of the group) with the channels innermost. Groups of M consecutive columns are then
M consecutive input channels at one kernel position, which is what 2:4 hardware asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MatrixLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)


def is_matrix_layer(module: nn.Module | None) -> TypeGuard[MatrixLayer]:
    """Whether a module is exactly a ConvNd or a Linear (a subclass may compute something else)."""
    return type(module) in (*CONVOLUTIONS, nn.Linear)


def flatten_weight(weight: Tensor) -> Tensor:
    """(R, C, *kernel) -> (R, prod(kernel) * C), channels innermost; a (R, C) weight is returned as it is."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


@dataclass(frozen=True)
class LayerGeometry:
    """Shape of the linear map of a Conv1d/2d/3d or a Linear layer (`kernel_size == ()`).

    Attributes:
        in_channels: C, channels (features) of the input.
        out_channels: R, channels (features) of the output.
        kernel_size: one size per spatial dimension; () for Linear.
        stride: steps per spatial dimension.
        padding: (before, after) per spatial dimension.
        dilation: kernel spacing per spatial dimension.
        groups: G.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Module) -> LayerGeometry:
        """Read the geometry of a ConvNd or Linear module.

        Raises:
            TypeError: for any other module.
        """
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features)
        if not isinstance(module, CONVOLUTIONS):
            raise TypeError(f"expected a Conv1d, Conv2d, Conv3d or Linear module, got {type(module).__name__}")
        return cls(
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=_explicit_padding(module),
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
        )

    @property
    def columns(self) -> int:
        """D, the number of weights of one output channel."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def rows(self) -> int:
        """R / G, output channels in one group."""
        return self.out_channels // self.groups

    @property
    def is_depthwise(self) -> bool:
        """Whether every group reads a single channel of several."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def is_pointwise(self) -> bool:
        """Whether each output reads one input position: Linear, or kernel 1 without padding."""
        return all(k == 1 for k in self.kernel_size) and not any(map(sum, self.padding))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(R, C/G, *kernel) -> (G, R/G, D), channels innermost."""
        return flatten_weight(weight).reshape(self.groups, self.rows, self.columns)

    def to_weight(self, matrix: Tensor) -> Tensor:
        """(G, R/G, D) -> (R, C/G, *kernel), the inverse of `to_matrix`."""
        channels_last = matrix.reshape(self.out_channels, *self.kernel_size, self.in_channels // self.groups)
        return channels_last.movedim(-1, 1).contiguous()

    @property
    def channel_dim(self) -> int:
        """Where inputs and outputs have their channels."""
        return 1 if self.kernel_size else -1

    def output_matrix(self, output: Tensor) -> Tensor:
        """Layer output (N, R, *spatial) or (..., R) -> (G, R/G, P), P positions over the whole batch."""
        channels_first = output.movedim(self.channel_dim, 0)
        return channels_first.reshape(self.groups, self.rows, -1)

    def batched(self, x: Tensor) -> Tensor:
        """The input or output with a batch dimension: torch's layers also accept (C, *spatial), and (C,) for Linear."""
        return x.unsqueeze(0) if x.dim() == len(self.kernel_size) + 1 else x

    def pad(self, x: Tensor) -> Tensor:
        """Apply the layer's own padding to (N, C, *spatial)."""
        if not any(map(sum, self.padding)):
            return x
        flat = [side for sides in reversed(self.padding) for side in sides]
        return F.pad(x, flat, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """An input (N, C, *spatial), and the zeros that a convolution has to add on both sides of each dimension.

        Padding that torch's convolutions cannot add is in the input already, and the zeros are none.
        """
        if self.padding_mode == "zeros" and all(before == after for before, after in self.padding):
            return x, tuple(before for before, _ in self.padding)
        return self.pad(x), (0,) * len(self.padding)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output: input (N, C, *spatial) or (..., C), weight (R, C/G, *kernel), bias (R,)."""
        if not self.kernel_size:
            return F.linear(x, weight, bias)
        x, padding = self.padded(x)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def output_size(self, padded_size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for an input that is already padded."""
        return tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded_size, self.kernel_size, self.stride, self.dilation, strict=True)
        )

    def patches(self, x: Tensor) -> Tensor:
        """im2col: input (N, C, *spatial), or (..., C) for Linear -> (G, P, D), columns ordered as the weight's.

        P runs over the batch and the output positions, in the order of `output_matrix`.
        """
        if not self.kernel_size:
            return x.reshape(1, -1, self.in_channels)
        x = self.pad(x)
        out = self.output_size(tuple(x.shape[2:]))
        for dim, (k, s, d) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True), start=2):
            # Each spatial axis becomes (output position, kernel offset); offsets collect at the end.
            windows = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
            x = windows
        n, dims = x.shape[0], len(out)
        x = x.reshape(n, self.groups, -1, *out, *self.kernel_size)
        kernel_axes = range(3 + dims, 3 + 2 * dims)
        order = (1, 0, *range(3, 3 + dims), *kernel_axes, 2)
        return x.permute(order).reshape(self.groups, n * math.prod(out), self.columns)


def _explicit_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    """Padding as (before, after) pairs; "same" puts the odd element after, as torch does."""
    if module.padding == "valid":
        return tuple((0, 0) for _ in module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


def layer_output(geometry: LayerGeometry, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Naive layer evaluation through `patches`, (G, R/G, P); the reference that tests compare with."""
    product = torch.einsum("grd,gpd->grp", matrix, geometry.patches(x))
    return product if bias is None else product + bias.reshape(geometry.groups, geometry.rows, 1)
