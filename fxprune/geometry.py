"""How a convolution or a linear layer reads its input, written as one matrix product per group.

Everywhere in fxprune a weight is seen as G matrices of R/G rows and D columns, and the columns are ordered
(kernel positions, input channels of the group) with the channels innermost. Groups of M consecutive columns are then
M consecutive input channels at one kernel position, which is what 2:4 hardware asks for.

A transposed convolution is a convolution of stride 1 with the kernel reversed, over the input with zeros between its
positions. Its kernel positions are in that order here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
MatrixLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed | nn.Linear
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_matrix_layer(module: nn.Module | None) -> TypeGuard[MatrixLayer]:
    """Whether a module is exactly a ConvNd, a ConvTransposeNd or a Linear (a subclass may compute something else)."""
    return type(module) in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)


def reduction_second(module: nn.Module) -> Tensor:
    """A Conv or Linear module's weight with its input channels on axis 1, as patterns count them.

    Of a transposed convolution (C, R/G, *kernel) -> (R/G, C, *kernel): where M divides C/G, its groups stay within one.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.transpose(0, 1) if isinstance(module, TRANSPOSED_CONVOLUTIONS) else weight


def flatten_weight(weight: Tensor) -> Tensor:
    """(R, C, *kernel) -> (R, prod(kernel) * C), channels innermost; a (R, C) weight is returned as it is."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def laid_out_like(before: Tensor, weight: Tensor) -> Tensor:
    """A weight with the strides of the one before, of the same shape: torch reads from them which memory format outputs get.

    Of a 1 x 1 kernel they are ambiguous, so that `contiguous()` lets channels last stand; a `view` behind it would fail.
    """
    return torch.empty_like(before.detach()).copy_(weight)


@dataclass(frozen=True)
class LayerGeometry:
    """Shape of the linear map of a Conv1d/2d/3d, a ConvTranspose1d/2d/3d or a Linear layer (`kernel_size == ()`).

    Attributes:
        in_channels: C, channels (features) of the input.
        out_channels: R, channels (features) of the output.
        kernel_size: one size per spatial dimension; () for Linear.
        stride: steps per spatial dimension.
        padding: (before, after) per spatial dimension.
        dilation: kernel spacing per spatial dimension.
        groups: G.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        transposed: whether it is a transposed convolution, whose padding takes away from the output.
        output_padding: of a transposed convolution, per spatial dimension; else ().
        blocks: B, into which each group's input channels are cut for solving; they are like groups that add up.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    blocks: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> LayerGeometry:
        """Read the geometry of a ConvNd, ConvTransposeNd or Linear module.

        Raises:
            TypeError: for any other module.
        """
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features)
        if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)):
            raise TypeError(f"expected a convolution or a Linear module, got {type(module).__name__}")
        transposed = isinstance(module, TRANSPOSED_CONVOLUTIONS)
        return cls(
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=_explicit_padding(module),
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
            transposed=transposed,
            output_padding=tuple(module.output_padding) if transposed else (),
        )

    @property
    def columns(self) -> int:
        """D, the number of weights of one output channel; with blocks, of those in one block."""
        return self.in_channels // self.matrices * math.prod(self.kernel_size)

    @property
    def matrices(self) -> int:
        """G, or G * B with blocks: how many matrices the weight is seen as."""
        return self.groups * self.blocks

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
        """(R, C/G, *kernel), or (C, R/G, *kernel) transposed -> (G, R/G, D), or (G B, R/G, D); channels innermost."""
        if self.transposed:
            axes = range(2, weight.dim())
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flip(*axes)
        if self.blocks > 1:
            in_blocks = weight.unflatten(1, (self.blocks, -1)).unflatten(0, (self.groups, -1))
            weight = in_blocks.transpose(1, 2).flatten(0, 2)
        return flatten_weight(weight).reshape(self.matrices, self.rows, self.columns)

    def to_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`."""
        rows = self.out_channels * self.blocks
        weight = matrix.reshape(rows, *self.kernel_size, self.in_channels // self.matrices).movedim(-1, 1)
        if self.blocks > 1:
            in_blocks = weight.unflatten(0, (self.groups, self.blocks, -1))
            weight = in_blocks.transpose(1, 2).flatten(0, 1).flatten(1, 2)
        if self.transposed:
            axes = range(2, weight.dim())
            weight = weight.flip(*axes).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.contiguous()

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
        """Apply the layer's own padding to (N, C, *spatial); of a transposed convolution, spread its positions out first."""
        if self.transposed:
            return self._spread_out(x)
        if not any(map(sum, self.padding)):
            return x
        flat = [side for sides in reversed(self.padding) for side in sides]
        return F.pad(x, flat, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _spread_out(self, x: Tensor) -> Tensor:
        """What the equivalent convolution of stride 1 reads: `stride - 1` zeros between positions, and zeros around them."""
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places = (slice(None), slice(None), *(slice(None, None, step) for step in self.stride))
        spread[places] = x
        flat: list[int] = []
        for k, d, (before, after), more in zip(
            self.kernel_size, self.dilation, self.padding, self.output_padding, strict=True
        ):
            flat = [d * (k - 1) - before, d * (k - 1) - after + more, *flat]
        return F.pad(spread, flat)

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """An input (N, C, *spatial), and the zeros that a convolution has to add on both sides of each dimension.

        Padding that torch's convolutions cannot add is in the input already, and the zeros are none.
        """
        if self.padding_mode == "zeros" and all(before == after for before, after in self.padding):
            return x, tuple(before for before, _ in self.padding)
        return self.pad(x), (0,) * len(self.padding)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output: input (N, C, *spatial) or (..., C), weight as the module's, bias (R,)."""
        if not self.kernel_size:
            return F.linear(x, weight, bias)
        if self.transposed:
            transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.kernel_size) - 1]
            less = tuple(before for before, _ in self.padding)
            return transposed(x, weight, bias, self.stride, less, self.output_padding, self.groups, self.dilation)
        x, padding = self.padded(x)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def output_size(self, padded_size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for an input that is already padded (of a transposed one, spread out)."""
        return tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded_size, self.kernel_size, self._steps, self.dilation, strict=True)
        )

    @property
    def _steps(self) -> tuple[int, ...]:
        """Stride over the padded input."""
        return (1,) * len(self.stride) if self.transposed else self.stride

    def output_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for an input of the given spatial size."""
        if self.transposed:
            sizes = zip(
                size, self.kernel_size, self.stride, self.dilation, self.padding, self.output_padding, strict=True
            )
            return tuple((n - 1) * s - sum(p) + d * (k - 1) + more + 1 for n, k, s, d, p, more in sizes)
        return self.output_size(tuple(n + sum(p) for n, p in zip(size, self.padding, strict=True)))

    def patches(self, x: Tensor) -> Tensor:
        """im2col: input (N, C, *spatial), or (..., C) for Linear -> (G, P, D), columns ordered as the weight's.

        P runs over the batch and the output positions, in the order of `output_matrix`. With blocks (G B, P, D).
        """
        if not self.kernel_size:
            if self.matrices == 1:
                return x.reshape(1, -1, self.in_channels)
            return x.reshape(-1, self.matrices, self.columns).transpose(0, 1)
        x = self.pad(x)
        out = self.output_size(tuple(x.shape[2:]))
        for dim, (k, s, d) in enumerate(zip(self.kernel_size, self._steps, self.dilation, strict=True), start=2):
            # Each spatial axis becomes (output position, kernel offset); offsets collect at the end.
            windows = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
            x = windows
        n, dims = x.shape[0], len(out)
        x = x.reshape(n, self.matrices, -1, *out, *self.kernel_size)
        kernel_axes = range(3 + dims, 3 + 2 * dims)
        order = (1, 0, *range(3, 3 + dims), *kernel_axes, 2)
        return x.permute(order).reshape(self.matrices, n * math.prod(out), self.columns)


def _explicit_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed) -> tuple[tuple[int, int], ...]:
    """Padding as (before, after) pairs; "same" puts the odd element after, as torch does."""
    if module.padding == "valid":
        return tuple((0, 0) for _ in module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


def layer_output(geometry: LayerGeometry, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Naive layer evaluation through `patches`, (G, R/G, P); the reference that tests compare with. Not for blocks."""
    product = torch.einsum("grd,gpd->grp", matrix, geometry.patches(x))
    return product if bias is None else product + bias.reshape(geometry.groups, geometry.rows, 1)
