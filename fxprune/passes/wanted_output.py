"""What a layer is asked to give, gathered as the calibration set streams by; shared by PruneWeights and LowRank."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.calibration.batch_store import BatchValues
from fxprune.calibration.observers import observer_of
from fxprune.calibration.sampling import PatchSample
from fxprune.calibration.stream import CalibrationStream
from fxprune.geometry import LayerGeometry
from fxprune.graph import input_of
from fxprune.layer_solution import SolvedLayer
from fxprune.options import Options
from fxprune.passes.destination import destination, skip_operands
from fxprune.passes.insert_observers import LayerTask
from fxprune.statistics import CrossStatistics, Pool

RECTIFIED_SHARE = 0.25  # What is gathered is small, and so is its noise.


def cross_statistics(
    stream: CalibrationStream, node: Node, task: LayerTask, options: Options
) -> CrossStatistics | None:
    """Stream up to a layer, and gather H in its observer and the cross term with the wanted output from the same patches.

    Args:
        stream: somewhere before the layer.
        node: the layer's call.
        task: the layer's, with its geometry.
        options: resolved; `target` and `inputs` count.

    Returns:
        The cross term; None where the wanted output is the layer's own on those inputs (target "weights").
    """
    geometry = task.geometry
    assert geometry is not None
    if options.target == "weights":
        stream.run_to(node)
        return None
    source, observer = input_of(node), observer_of(node)
    skips = skip_operands(node) if options.target in ("skip", "rectified") else ()
    cross = CrossStatistics.empty(geometry, stream.device)

    def update(seen: LayerGeometry, x: Tensor, y: Tensor) -> None:
        if unseen:
            observer.add(seen, x)
        cross.update(seen, x, y)

    pool = Pool(update)

    def visit(number: int, values: BatchValues) -> None:
        x = stream.observed(values, source)
        sample = stream.sample(geometry, x, number)
        y = _compensated(values, node, skips, sample)
        pool.put(sample.geometry, geometry.batched(sample.input(x)), geometry.batched(y))

    with observer.paused() as unseen:
        stream.run_to(node, visit)
    stream.gather(pool)
    return cross


def rectified_statistics(
    stream: CalibrationStream, node: Node, geometry: LayerGeometry, cross: CrossStatistics, layer: SolvedLayer
) -> CrossStatistics:
    """The cross term of the output that is wanted of a layer before a rectifier, given what it puts out now.

    Where the dense value y lies below the threshold, any z below it will do: the error that counts is max(z, 0)^2 there and
    (z - y)^2 elsewhere, which is convex in z and no less than (relu(z) - relu(y))^2. It is lowered by majorisation: where
    y < 0 the wanted output is min(z, 0), with z what the layer gives now, and y elsewhere. After the non-linear
    reconstruction of Zhang et al. 2015, Accelerating Very Deep Convolutional Networks, section 3.2.

    What is gathered is the change from y: it is small, and settles sooner than the cross term.

    Args:
        stream: at the layer.
        node: the layer's call.
        geometry: of the layer.
        cross: the cross term with y, the wanted output without the rectifier (`cross_statistics`).
        layer: its parameters so far.
    """
    source, goes_to = input_of(node), destination(node)
    assert goes_to.rectifier is not None
    low, high = goes_to.rectifier
    change = CrossStatistics.empty(geometry, stream.device)

    def update(seen: LayerGeometry, x: Tensor, dense: Tensor, *added: Tensor) -> None:
        z = sum(added, start=seen.apply(x, layer.weight, layer.bias))
        change.update(seen, x, _rectified(dense, z, low, high))

    pool = Pool(update)

    def visit(number: int, values: BatchValues) -> None:
        x = stream.observed(values, source)
        sample = stream.sample(geometry, x, number, share=RECTIFIED_SHARE)
        output = dense = sample.output(values.dense(node))
        added: list[Tensor] = []
        for operand in goes_to.added:
            if isinstance(operand, Node):
                dense = dense + sample.output(values.dense(operand))
                added.append(sample.output(values.pruned(operand)))
            else:
                dense = dense + operand
                added.append(output.new_tensor(operand))
        if dense.shape == output.shape:  # Else the sum spreads the layer's output out: no single value is wanted of it.
            of_layer = (sample.input(x), dense, *(value.expand_as(output) for value in added))
            pool.put(sample.geometry, *map(geometry.batched, of_layer))

    stream.revisit(visit)
    stream.gather(pool)
    return cross.plus(change)


def _compensated(values: BatchValues, node: Node, skips: Iterable[Node], sample: PatchSample) -> Tensor:
    """The dense output of a layer, plus the errors of the values that will be added to it."""
    output: Tensor = values.dense(node)
    y = sample.output(output)
    for skip in skips:
        dense, pruned = values.dense(skip), values.pruned(skip)
        if dense is not pruned and dense.shape == output.shape:
            y = y + (sample.output(dense) - sample.output(pruned))
    return y


def _rectified(dense: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    """By how much the wanted output of a layer that gives z now differs from the dense value, for a rectifier's bounds."""
    change = torch.where(dense <= low, z.clamp_max(low) - dense, 0)
    return change if high == math.inf else torch.where(dense >= high, z.clamp_min(high) - dense, change)
