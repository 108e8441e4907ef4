"""How far a layer's stored tensors moved, with BatchNorm folded where the other graph has it folded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.graph_diff.model_graph import Weights

# Folding in float32 instead of float64 moves weights by about this much, relative to their norm.
ROUNDING = 1e-5


def fold(weights: Weights, norm: Weights) -> Weights:
    """A layer with the BatchNorm after it folded in, computed in float64 and rounded to the weight's dtype.

    Args:
        weights: of a layer with R output channels.
        norm: of a BatchNorm over R channels.
    """
    weight, scale, shift = weights.weight, norm.scale, norm.shift
    assert weight is not None
    assert scale is not None
    assert shift is not None
    if weights.transposed:
        per_group = weight.double().unflatten(0, (weights.groups, -1))
        by_group = scale.view(weights.groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = (per_group * by_group).flatten(0, 1)
    else:
        folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = weights.others["bias"].double() * scale + shift if "bias" in weights.others else shift
    others = {**weights.others, "bias": bias.to(weight.dtype)}
    return Weights(folded.to(weight.dtype), others, weights.groups, weights.transposed)


def reorder(weights: Weights, inputs: Tensor | None, outputs: Tensor | None) -> Weights:
    """The same layer with its channels in another order: new channel i is old channel `inputs[i]` or `outputs[i]`.

    Args:
        weights: of a convolution, a matrix product, or of a normalisation of R channels.
        inputs: (C,) for the input's channels, each within its group; None leaves them.
        outputs: (R,) for the output's channels; None leaves them.
    """
    weight, rows = weights.weight, 1 if weights.transposed else 0
    others = dict(weights.others)
    if outputs is not None:
        weight = None if weight is None else weight.index_select(rows, outputs)
        others = {name: tensor[outputs] if len(tensor) == len(outputs) else tensor for name, tensor in others.items()}
    if inputs is not None and weight is not None and weights.groups == 1:
        weight = weight.index_select(1 - rows, inputs)
    elif inputs is not None and weight is not None and weight.shape[1] > 1:
        grouped = inputs.reshape(weights.groups, -1)
        within = grouped - torch.arange(weights.groups)[:, None] * grouped.shape[1]
        columns = within.repeat_interleave(len(weight) // weights.groups, dim=0)
        weight = weight[torch.arange(len(weight))[:, None], columns]
    return Weights(weight, others, weights.groups, weights.transposed)


def same_numbers(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, in whatever order."""
    if before is None or after is None or before.shape != after.shape:
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
