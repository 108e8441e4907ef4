"""A batch size that a file fixes in its constants, such as Reshape to [1, 1000], opened again.

A reshape keeps the order of the numbers. So where a batch of images stands in the shape before tells where it stands in
the shape after: behind as many numbers. If the file was made with one image, an axis of size 1 does not show, and there may
be two readings, [L, N * H, D] and [N * L, H, D]; they are tried in turn, and whatever comes out is compared with single images.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fxprune.onnx_import.graph import BATCH, FILE, ProbeError, TorchGraph
from fxprune.onnx_import.values import Activation, Known, Size, at


def batch_axis(graph: TorchGraph, x: Activation) -> int | None:
    """The axis that is longer for more images; None if none is, or several are."""
    other = graph.probe(BATCH)
    if other is None:
        return None
    before, after = x.probes[0].shape, x.probes[other].shape
    axes = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 and after[axes[0]] % max(before[axes[0]], 1) == 0 else None


def reshaped(graph: TorchGraph, x: Activation, target: list[Any]) -> Activation:
    """A tensor in another shape, in which numbers may be `Size`s and one may be -1; with the batch size left open."""
    shapes = [_resolved(tuple(probe.shape), [at(t, i) for t in target]) for i, probe in enumerate(x.probes)]
    if shapes[0] is None:
        raise ProbeError(FILE, f"{x.shape} cannot be reshaped to {[at(t, 0) for t in target]}")
    axis, other = batch_axis(graph, x), graph.probe(BATCH)
    if axis is None or other is None:
        return _reshape(graph, x, target, x.outer)
    ratio = x.probes[other].shape[axis] // x.shape[axis]
    places = _places(x, axis, shapes[0], graph.batch)
    if not places:
        raise ProbeError(BATCH, f"a reshape from {x.shape} to {shapes[0]} mixes the images of a batch")
    if shapes[other] is not None:
        for j, outer in places:
            if shapes[other] == _scaled(shapes[0], j, ratio):
                return _reshape(graph, x, target, outer)
    j, outer = graph.choices.choose(places)
    opened = list(target)
    if -1 in [t for t in target if isinstance(t, int)]:
        free = target.index(-1)
        sizes = {shape[free] for i, shape in enumerate(shapes) if shape is not None and i != other}
        if len(sizes) == 1:
            opened[free] = sizes.pop()
            opened[j] = -1
        elif free != j:
            opened[j] = graph.size(x, axis) * shapes[0][j] // x.shape[axis]
    else:
        opened[j] = -1
    return _reshape(graph, x, opened, outer)


def _reshape(graph: TorchGraph, x: Activation, target: list[Any], outer: int) -> Activation:
    made = graph.method("reshape", x, _shortest(x, target))
    return Activation(made.node, made.probes, outer)


def _shortest(x: Activation, target: list[Any]) -> tuple[Any, ...]:
    """A target with -1 in place of its only size that is not known now, which needs no arithmetic in the graph."""
    unknown = [i for i, t in enumerate(target) if isinstance(t, Size)]
    if len(unknown) == 1 and -1 not in [t for t in target if isinstance(t, int)] and 0 not in x.shape:
        target = [*target[: unknown[0]], -1, *target[unknown[0] + 1 :]]
    return tuple(target)


def _resolved(shape: tuple[int, ...], target: list[int]) -> tuple[int, ...] | None:
    """The shape that a target with -1 means; None if it does not fit."""
    total, given = math.prod(shape), math.prod(t for t in target if t != -1)
    if -1 in target:
        if given == 0 or total % given:
            return None
        return tuple(total // given if t == -1 else t for t in target)
    return tuple(target) if given == total else None


def _scaled(shape: tuple[int, ...], axis: int, ratio: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * ratio, *shape[axis + 1 :])


def _places(x: Activation, axis: int, target: tuple[int, ...], batch: int) -> list[tuple[int, int]]:
    """Where the batch may stand in a target: (axis, how often it is gone through along it), the likeliest first."""
    before = math.prod(x.shape[:axis]) * x.outer
    places, passed = [], 1
    for j, size in enumerate(target):
        if passed and before % passed == 0 and size and size % (before // passed * batch) == 0:
            places.append((j, before // passed))
        passed *= size
    return sorted(places, key=lambda p: (target[p[0]] != x.shape[axis] or p[1] != x.outer, p[1] != 1, p[0]))


def expanded(graph: TorchGraph, value: Known | Activation, others: list[Activation], along: int) -> Activation:
    """A tensor that stands beside those of a batch, as often as there are images; one that is there already stays.

    Args:
        graph: where to build.
        value: the tensor.
        others: those beside it.
        along: the axis along which they are joined, whose size may differ.
    """
    x = graph.tensor(value)
    for other in others:
        axis = batch_axis(graph, other)
        if axis is None or axis == along or other.rank != x.rank or batch_axis(graph, x) is not None:
            continue
        if x.shape[axis] != other.shape[axis]:
            continue
        if x.shape[axis] > 1:  # All images of the file's batch must have the same.
            if not isinstance(value, Known) or (value.array != value.array.take([0], axis)).any():
                continue
            x = graph.call(torch.narrow, x, axis, 0, 1)
        x = graph.method("expand", x, *(graph.size(other, axis) if i == axis else -1 for i in range(x.rank)))
    return x
