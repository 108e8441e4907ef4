"""Targets: what a layer's output should be, as the cross term of that output with the layer's input.

The target is the dense model's output; with the error added that a skip connection brings; or ReLU-aware, where a ReLU follows.
The stream gathers the cross term while it stands at the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.calibration.batch_store import BatchValues
from fxprune.calibration.observers import observer_of
from fxprune.calibration.sampling import CHECK_EVERY, BatchPlace, PatchSample
from fxprune.consumers import consumers, skip_operands
from fxprune.geometry import LayerGeometry
from fxprune.graph import input_of
from fxprune.layers.solve import SolvedLayer
from fxprune.layers.temperature import BothLogits
from fxprune.runtime.processes import gathered
from fxprune.statistics import CrossStatistics, HessianObserver, Moments, Pool

if TYPE_CHECKING:
    from fxprune.calibration.stream import CalibrationStream

RELU_AWARE_SHARE = 0.25  # Of the patches: only the change of the target is gathered; it is small, and so is its noise.


def checked(values: Tensor, place: BatchPlace) -> Tensor:
    """Of the values of a batch's images those that check what is fitted to the others."""
    return values[-place.first % CHECK_EVERY :: CHECK_EVERY]


def cross_statistics(
    stream: CalibrationStream, node: Node, geometry: LayerGeometry, *, skip: bool
) -> tuple[CrossStatistics, Moments | None]:
    """Stream up to a layer, and gather H in its observer and the cross term with the target from the same patches.

    Where the layer takes all patches there are, and so has none too many, the moments of every fourth image are also kept by
    themselves (`layers.shrinkage`).

    Args:
        stream: somewhere before the layer.
        node: the layer's call.
        geometry: of the layer.
        skip: whether the target takes up the error that a skip connection brings to the add that follows.
    """
    source, observer = input_of(node), observer_of(node)
    skips = skip_operands(node) if skip else ()
    cross = CrossStatistics.empty(geometry, stream.device)
    check = HessianObserver(geometry), CrossStatistics.empty(geometry, stream.device)

    def update(seen: LayerGeometry, x: Tensor, y: Tensor) -> None:
        if observes:
            observer.add(seen, x)
        cross.update(seen, x, y)

    def update_check(seen: LayerGeometry, x: Tensor, y: Tensor) -> None:
        check[0].add(seen, x)
        check[1].update(seen, x, y)

    pool, check_pool = Pool(update), Pool(update_check)

    def visit(place: BatchPlace, values: BatchValues) -> None:
        x = stream.observed(values, source)
        sample = stream.sample(geometry, x, place)
        y = _compensated(stream, values, node, skips, sample)
        of_both = geometry.batched(sample.input(x)), geometry.batched(y)
        pool.put(sample.geometry, *of_both)
        if stream.check and sample.is_whole and len(of_both[0]) == place.images:
            check_pool.put(sample.geometry, *(checked(value, place) for value in of_both))

    with observer.paused() as observes:
        stream.advance(node, visit)
    stream.gather(pool)
    stream.gather(check_pool)
    cross = cross.summed()
    check_cross = check[1].summed() if stream.check else check[1]
    seen = 0 < check_cross.count < cross.count
    return cross, Moments(check[0].statistics(), check_cross) if seen else None


def relu_aware_statistics(
    stream: CalibrationStream, node: Node, geometry: LayerGeometry, cross: CrossStatistics, layer: SolvedLayer
) -> CrossStatistics:
    """The cross term with the ReLU-aware target, given what the layer puts out now.

    Where the dense value y lies below the threshold, any z below it will do: the error that counts is max(z, 0)^2 there and
    (z - y)^2 elsewhere, which is convex in z and no less than (relu(z) - relu(y))^2. It is lowered by majorisation: where
    y < 0 the target is min(z, 0), with z what the layer gives now, and y elsewhere. After the non-linear
    reconstruction of Zhang et al. 2015, Accelerating Very Deep Convolutional Networks, section 3.2.

    Only the change from y to this target is gathered: it is small, and needs fewer patches than the whole.

    Args:
        stream: at the layer.
        node: the layer's call.
        geometry: of the layer.
        cross: the cross term with y, the target without the rectifier (`cross_statistics`).
        layer: its parameters so far, one part.
    """
    source, reached = input_of(node), consumers(node)
    (part,) = layer.parts
    assert reached.rectifier is not None
    low, high = reached.rectifier
    change = CrossStatistics.empty(geometry, stream.device)

    def update(seen: LayerGeometry, x: Tensor, dense: Tensor, *added: Tensor) -> None:
        z = sum(added, start=seen.apply(x, part.weight, part.bias))
        change.update(seen, x, _relu_aware(dense, z, low, high))

    pool = Pool(update)

    def visit(place: BatchPlace, values: BatchValues) -> None:
        x = stream.observed(values, source)
        sample = stream.sample(geometry, x, place, share=RELU_AWARE_SHARE)
        output = dense = sample.output(stream.wanted(values, node))
        added: list[Tensor] = []
        for operand in reached.added:
            if isinstance(operand, Node):
                dense = dense + sample.output(stream.wanted(values, operand))
                added.append(sample.output(values.pruned(operand)))
            else:
                dense = dense + operand
                added.append(output.new_tensor(operand))
        # Otherwise the add broadcasts the layer's output, and each value of it has several targets.
        if dense.shape == output.shape:
            of_layer = (sample.input(x), dense, *(value.expand_as(output) for value in added))
            pool.put(sample.geometry, *map(geometry.batched, of_layer))

    stream.revisit(visit)
    stream.gather(pool)
    return cross.plus(change.summed())


def outputs_of_both(
    stream: CalibrationStream, node: Node, geometry: LayerGeometry, layer: SolvedLayer, *, check: bool
) -> BothLogits:
    """What a layer at which the stream stands puts out in the dense model, and with new parameters.

    On mixtures of images, if any could be made. Of several processes each gives that of its own images.

    Args:
        stream: at the layer, a Linear one with one vector for each image.
        node: the layer's call.
        geometry: of the layer.
        layer: its new parameters, one part.
        check: on every fourth of the fitted images alone (`cross_statistics`), where there are no mixtures.
    """
    source, (part,) = input_of(node), layer.parts
    outputs: list[tuple[Tensor, Tensor]] = []

    def add(x: Tensor, dense: Tensor) -> None:
        if dense.dim() == 2:
            outputs.append((dense, geometry.apply(x, part.weight, part.bias)))

    def visit(place: BatchPlace, values: BatchValues) -> None:
        x, dense = stream.observed(values, source), stream.wanted(values, node)
        add(*((checked(x, place), checked(dense, place)) if check else (x, dense)))

    stream.revisit_mixtures(lambda values: add(stream.observed(values, source), stream.wanted(values, node)))
    mixed = any(gathered(bool(outputs)))
    if not mixed:
        stream.revisit(visit)
    none = part.weight.new_zeros(0, geometry.out_channels)
    dense, found = (torch.cat(of_one) for of_one in zip(*(outputs or [(none, none)]), strict=True))
    return BothLogits(dense, found, mixed)


def _compensated(
    stream: CalibrationStream, values: BatchValues, node: Node, skips: Iterable[Node], sample: PatchSample
) -> Tensor:
    """The dense output of a layer, plus the errors of the values that will be added to it."""
    output: Tensor = stream.wanted(values, node)
    y = sample.output(output)
    for skip in skips:
        dense, pruned = stream.wanted(values, skip), values.pruned(skip)
        if dense is not pruned and dense.shape == output.shape:
            y = y + (sample.output(dense) - sample.output(pruned))
    return y


def _relu_aware(dense: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    """ReLU-aware target less dense value, for a layer that puts out z now and a rectifier that clamps to (low, high)."""
    change = torch.where(dense <= low, z.clamp_max(low) - dense, 0)
    return change if high == math.inf else torch.where(dense >= high, z.clamp_min(high) - dense, change)
