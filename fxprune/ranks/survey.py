"""survey(): what every rank of every layer costs, from one run of the dense model over the calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size
from torch.fx import GraphModule, Node

from fxprune.calibration.calibration import Calibration
from fxprune.calibration.macs import layer_shapes, macs_per_sample
from fxprune.calibration.stream import dense_statistics
from fxprune.geometry import LayerGeometry
from fxprune.layers.problem import layer_of, pose_problem
from fxprune.layers.splits import Split, dense_macs, factored_macs, full_rank
from fxprune.options import Method
from fxprune.ranks.plan import Choice, LayerRanks, Survey, pareto
from fxprune.runtime.precision import full_precision
from fxprune.runtime.processes import shared
from fxprune.solvers.low_rank import tail_energy, whitened_target
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.spatial_split import arranged, spatial_errors, whitened_arrangement
from fxprune.statistics import InputStatistics

RANKS_TRIED = 48  # of each split, spread evenly where there are more


def survey(
    graph_module: GraphModule,
    layers: Sequence[Node],
    calibration: Calibration,
    method: Method,
    *,
    splits: Sequence[Split],
    multiple: int,
) -> Survey:
    """Price every rank of every layer.

    Args:
        graph_module: with observers in front of the layers, which are empty before and after.
        layers: their calls.
        calibration: the images.
        method: "svd" judges a rank by the weight's singular values, "data_aware" by the output error.
        splits: those to consider.
        multiple: ranks considered are multiples of it.
    """
    data_aware = method.factorisation == "data_aware"
    if data_aware:
        calibration.hold()
    example = calibration.example(graph_module)
    shapes = {node: read for node, (read, _) in layer_shapes(example).items()}
    seen = layers if data_aware else ()
    with (
        torch.no_grad(),
        full_precision(),
        dense_statistics(graph_module, calibration, method.options, seen) as statistics,
    ):

        def ranks_of(node: Node) -> LayerRanks:
            problem = _problem(node, statistics[node], method) if data_aware else None
            return _layer_ranks(node, shapes[node], problem, splits, multiple)

        found = dict(zip((str(node.target) for node in layers), shared(ranks_of, list(layers)), strict=True))
    return Survey(found, sum(macs_per_sample(example).values()))


def _problem(node: Node, inputs: InputStatistics, method: Method) -> LayerProblem:
    """What the layer's own dense output asks of it."""
    module = layer_of(node)
    return next(pose_problem(module, LayerGeometry.of(module), inputs, None, method.options).groups())


def _layer_ranks(
    node: Node,
    shape: Size,
    problem: LayerProblem | None,
    splits: Sequence[Split],
    multiple: int,
) -> LayerRanks:
    geometry = LayerGeometry.of(layer_of(node))
    weight = geometry.to_matrix(layer_of(node).weight.detach()).double()[0]
    whole = dense_macs(geometry, shape)
    choices: list[Choice] = []
    spectra: dict[Split, tuple[float, ...]] = {}
    for split in splits:
        highest = full_rank(geometry, split)
        if not highest:
            continue
        kernel: Any = geometry.kernel_size
        if split == "channel":
            spectrum = torch.linalg.svdvals(weight if problem is None else whitened_target(problem))
        else:
            matrix = arranged(weight, kernel) if problem is None else whitened_arrangement(problem, kernel)
            spectrum = torch.linalg.svdvals(matrix)
        spectra[split] = tuple((spectrum / spectrum[0].clamp_min(torch.finfo(spectrum.dtype).tiny)).tolist())
        costs = {rank: factored_macs(geometry, shape, split, rank) for rank in range(multiple, highest + 1, multiple)}
        ranks = [rank for rank, cost in costs.items() if cost < whole]
        ranks = ranks[:: -(-len(ranks) // RANKS_TRIED) or 1]
        if not ranks:
            continue
        errors = tail_energy(spectrum)[ranks]
        if split == "spatial" and problem is not None:
            errors = spatial_errors(problem, kernel, ranks)
        choices += [Choice(split, r, costs[r], e) for r, e in zip(ranks, errors.tolist(), strict=True)]
    return LayerRanks(whole, pareto(choices), spectra)
