"""What a layer is asked to give, gathered as the calibration set streams by; shared by PruneWeights and LowRank."""

from __future__ import annotations

from torch.fx import Node

from fxprune.batch_store import BatchValues
from fxprune.calibration import CalibrationStream
from fxprune.graph import input_of
from fxprune.options import Options
from fxprune.passes.insert_observers import LayerTask
from fxprune.passes.skip_connections import skip_operands
from fxprune.statistics import CrossStatistics


def cross_statistics(
    stream: CalibrationStream, node: Node, task: LayerTask, options: Options
) -> CrossStatistics | None:
    """Stream up to a layer: its observer gathers H on the way, the cross term with the wanted output comes here.

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
    source = input_of(node)
    skips = skip_operands(node) if options.target == "skip" else ()
    cross = CrossStatistics.empty(geometry, stream.device)

    def visit(values: BatchValues) -> None:
        x = values.dense(source) if options.inputs == "dense" else values.pruned(source)
        y = values.dense(node)
        for skip in skips:
            dense, pruned = values.dense(skip), values.pruned(skip)
            if dense is not pruned and dense.shape == y.shape:
                y = y + (dense - pruned)
        cross.update(geometry, x, y)

    stream.run_to(node, visit)
    return cross
