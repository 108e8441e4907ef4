"""Stored tensors of one operation, and how far they moved, BatchNorm folded and channels in the other graph's order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fxprune.channels.apply import reordered
from fxprune.passes.fold_batchnorm import scaled_outputs

# Folding in float32 instead of float64 moves weights by about this much, relative to their norm.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Weights:
    """Stored tensors of one node, on the CPU.

    Attributes:
        weight: (R, C/G, *kernel) of a convolution, (R, C) of a matrix product, (C, R/G, *kernel) of a transposed
            convolution; None for a node that is neither.
        others: bias, BatchNorm's parameters and statistics, ..., by name.
        groups: G.
        transposed: whether it is a transposed convolution.
        matrices: of a recurrent layer: its weights by name, (gates * H, C) each; `weight` is None then.
        scale: of a BatchNorm in eval mode: what it multiplies each channel by, (R,) in float64.
        shift: of a BatchNorm: what it adds to each channel then, (R,) in float64.
    """

    weight: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    groups: int = 1
    transposed: bool = False
    scale: Tensor | None = None
    shift: Tensor | None = None
    matrices: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def all(self) -> Tensor | None:
        """The weight, or the numbers of all matrices in a row; None for a node that has neither."""
        if self.weight is not None or not self.matrices:
            return self.weight
        return torch.cat([self.matrices[name].flatten() for name in sorted(self.matrices)])


def fold(weights: Weights, norm: Weights) -> Weights:
    """A layer with the BatchNorm after it folded in, computed in float64 and rounded to the weight's dtype.

    Args:
        weights: of a layer with R output channels.
        norm: of a BatchNorm over R channels.
    """
    assert weights.weight is not None
    assert norm.scale is not None
    assert norm.shift is not None
    groups = weights.groups if weights.transposed else None
    bias = weights.others.get("bias")
    weight, bias = scaled_outputs(weights.weight, bias, norm.scale, norm.shift, transposed_groups=groups)
    return Weights(weight, {**weights.others, "bias": bias}, weights.groups, weights.transposed)


def reorder(weights: Weights, inputs: Tensor | None, outputs: Tensor | None) -> Weights:
    """The same layer with its channels in another order, or some of them: new channel i is old `inputs[i]` or `outputs[i]`.

    Args:
        weights: of a convolution, a matrix product, or of a normalisation of R channels.
        inputs: (C,) for the input's channels, each within its group; None leaves them.
        outputs: (R,) for the output's channels; None leaves them.
    """
    weight = weights.weight
    rows = None if weight is None else weight.shape[1 if weights.transposed else 0]
    into, out = (None if places is None else places.numpy() for places in (inputs, outputs))
    if weight is not None:
        weight = reordered(weight, into, out, groups=weights.groups, transposed=weights.transposed)
    others = {
        name: tensor[outputs]
        if outputs is not None and tensor.dim() and len(tensor) in (rows, len(outputs))
        else tensor
        for name, tensor in weights.others.items()
    }
    return replace(weights, weight=weight, others=others)


def same_numbers(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, in whatever order."""
    if before is None or after is None or before.shape != after.shape:
        return False
    if torch.count_nonzero(before) != torch.count_nonzero(after):  # Sorting takes a hundred times longer.
        return False
    return torch.equal(before.flatten().sort().values, after.to(before.dtype).flatten().sort().values)


def relative_change(before: Tensor | None, after: Tensor | None) -> float | None:
    """||after - before|| / ||before|| (Frobenius); None if the shapes differ or a number is not finite."""
    if before is None or after is None or before.shape != after.shape:
        return None
    if _same(before, after):
        return 0.0
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    moved = torch.linalg.vector_norm(after.to(dtype) - before.to(dtype), dtype=torch.float64)
    size = torch.linalg.vector_norm(before.to(dtype), dtype=torch.float64)
    change = float(moved / size) if size > 0 else 1.0
    return change if change < float("inf") else None


def was_folded(before: Weights, norm: Weights, after: Weights) -> bool:
    """Whether a layer that lost the BatchNorm behind it looks like the folded layer rather than like itself.

    Judged by the weight and, for a weight that BatchNorm does not scale, by the bias.
    """
    if before.weight is None or norm.scale is None or len(norm.scale) != _out_channels(before):
        return False
    folded = fold(before, norm)
    plain, scaled = (relative_change(w.weight, after.weight) for w in (before, folded))
    if plain is None or scaled is None:
        return False
    if abs(plain - scaled) > ROUNDING:
        return scaled < plain
    wanted = folded.others["bias"]
    bias = after.others.get("bias", torch.zeros_like(wanted))
    change = relative_change(wanted, bias.to(wanted.dtype)) if wanted.any() else float(bias.any())
    return change is not None and change < 0.5


def _out_channels(weights: Weights) -> int:
    assert weights.weight is not None
    return weights.weight.shape[1] * weights.groups if weights.transposed else weights.weight.shape[0]


def changed_others(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Name -> relative change of bias, statistics and others that both sides have and that differ."""
    changes = {}
    for name in before:
        if name in after and not _same(before[name], after[name]):
            changes[name] = relative_change(before[name], after[name])
    return changes


def _same(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and bool(((before == after) | ((before != before) & (after != after))).all())


def composed(first: Tensor, second: Tensor) -> Tensor | None:
    """The weight of one layer that does what two in a row do, such as the two halves of an SVD.

    Args:
        first: (r, C, *kernel) or (r, C), one group.
        second: (R, r, *kernel) or (R, r), one group; in each dimension one of the two kernels has size 1.

    Returns:
        (R, C, *kernel), or None if the two do not compose so.
    """
    if first.dim() != second.dim() or second.shape[1] != first.shape[0]:
        return None
    kernels = list(zip(first.shape[2:], second.shape[2:], strict=True))
    if any(a != 1 and b != 1 for a, b in kernels):
        return None
    left, right = second.double().movedim(1, -1), first.double()
    product = torch.tensordot(left, right, dims=1)  # (R, *second's kernel, C, *first's kernel)
    count = len(kernels)
    pairs = [axis for i in range(count) for axis in (1 + i, 2 + count + i)]  # each axis of one beside that of the other
    product = product.permute(0, 1 + count, *pairs)
    merged: Tensor = product.reshape(second.shape[0], first.shape[1], *(a * b for a, b in kernels))
    return merged.to(first.dtype)


def weight_macs(
    weights: Weights,
    input_shape: tuple[int | str, ...],
    output_shape: tuple[int | str, ...],
) -> int | None:
    """MACs of a convolution or matrix product with a stored weight, for one sample.

    Every weight is used once at each output position, of a transposed convolution at each input position.

    Args:
        weights: of the node.
        input_shape: (N, C, *spatial) or (N, ..., C).
        output_shape: (N, R, *spatial) or (N, ..., R).

    Returns:
        The count, or None where a size is open or there is no weight.
    """
    weight = weights.weight
    if weight is None:
        return None
    shape = input_shape if weights.transposed else output_shape
    spatial = weight.dim() - 2
    # A convolution also takes input without a batch axis: (C, *spatial).
    positions = (shape[-spatial:] if spatial else shape[1:-1]) if shape else ()
    sizes = [size for size in positions if isinstance(size, int)]
    return weight.numel() * math.prod(sizes) if len(sizes) == len(positions) else None


def recurrent_macs(weights: Weights, steps: int | str) -> int | None:
    """MACs of a recurrent layer for one sample: every matrix is used once at each time step."""
    return sum(matrix.numel() for matrix in weights.matrices.values()) * steps if isinstance(steps, int) else None
