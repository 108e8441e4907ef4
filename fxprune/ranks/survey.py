"""survey(): one run of the dense model over the calibration set, from which the error of every rank follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.calibration.observers import observer_of
from fxprune.calibration.stream import CalibrationStream
from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, LayerGeometry
from fxprune.graph import call_sites
from fxprune.layer_solution import layer_of, pose_problem
from fxprune.options import Options
from fxprune.passes.insert_observers import TASK, LayerTask
from fxprune.ranks.choices import Choice, LayerRanks, Survey, pareto
from fxprune.ranks.splits import Split, dense_multiply_adds, full_rank, multiply_adds
from fxprune.solvers import LayerProblem
from fxprune.solvers.low_rank import tail_energy, whitened_target
from fxprune.solvers.spatial_split import arranged, spatial_errors, whitened_arrangement

Method = Literal["svd", "data_aware"]
METHODS: tuple[Method, ...] = ("svd", "data_aware")
RANKS_TRIED = 48  # of each split, spread evenly where there are more


def survey(
    graph_module: GraphModule,
    batches: Sequence[Any],
    *,
    method: Method,
    splits: Sequence[Split],
    multiple: int,
    options: Options,
) -> Survey:
    """Price every rank of every layer that `InsertObservers(Factorable(...))` observes.

    Args:
        graph_module: with observers, which are empty before and after.
        batches: calibration batches.
        method: "svd" judges a rank by the weight's singular values, "data_aware" by the output error.
        splits: those to consider.
        multiple: ranks considered are multiples of it.
        options: resolved options.
    """
    observed = {
        node: node.meta[TASK].geometry
        for node in graph_module.graph.nodes
        if isinstance(node.meta.get(TASK), LayerTask) and node.meta[TASK].role == "prune"
    }
    observers = {observer_of(node) for node in observed}
    for observer in observers:
        observer.enabled = method == "data_aware"
    shapes, total = _run(graph_module, batches if method == "data_aware" else batches[:1], options)
    layers = {}
    with torch.no_grad():
        for node, geometry in observed.items():
            problem = _problem(node, geometry, options) if method == "data_aware" else None
            shape = shapes[layer_of(node)]
            layers[str(node.target)] = _layer_ranks(node, geometry, shape, problem, splits, multiple)
    for observer in observers:
        observer.enabled = True
        observer.reset()
    return Survey(layers, total)


def _run(
    graph_module: GraphModule, batches: Sequence[Any], options: Options
) -> tuple[dict[nn.Module, torch.Size], int]:
    """Run the dense model; the input shape of every Conv and Linear module, and their multiply-adds for one sample."""
    shapes: dict[nn.Module, torch.Size] = {}
    counts: dict[nn.Module, int] = {}

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[module] = inputs[0].shape
        moved = inputs[0] if isinstance(module, TRANSPOSED_CONVOLUTIONS) else output
        counts[module] = counts.get(module, 0) + moved.numel() * (module.weight.numel() // module.weight.shape[0])

    layers = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)
    stream = CalibrationStream.by(options, graph_module, batches)
    stream.read()
    handles = [m.register_forward_hook(note) for m in call_sites(graph_module) if isinstance(m, layers)]
    try:
        stream.finish()
    finally:
        for handle in handles:
            handle.remove()
    return shapes, sum(counts.values()) // stream.source.images


def _problem(node: Node, geometry: LayerGeometry, options: Options) -> LayerProblem:
    """What the layer's own dense output asks of it."""
    module, inputs = layer_of(node), observer_of(node).statistics()
    return next(pose_problem(module, geometry, inputs, None, options).groups())


def _layer_ranks(
    node: Node,
    geometry: LayerGeometry,
    shape: torch.Size,
    problem: LayerProblem | None,
    splits: Sequence[Split],
    multiple: int,
) -> LayerRanks:
    weight = geometry.to_matrix(layer_of(node).weight.detach()).double()[0]
    whole = dense_multiply_adds(geometry, shape)
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
        costs = {rank: multiply_adds(geometry, shape, split, rank) for rank in range(multiple, highest + 1, multiple)}
        ranks = [rank for rank, cost in costs.items() if cost < whole]
        ranks = ranks[:: -(-len(ranks) // RANKS_TRIED) or 1]
        if not ranks:
            continue
        errors = tail_energy(spectrum)[ranks]
        if split == "spatial" and problem is not None:
            errors = spatial_errors(problem, kernel, ranks)
        choices += [Choice(split, r, costs[r], e) for r, e in zip(ranks, errors.tolist(), strict=True)]
    return LayerRanks(whole, pareto(choices), spectra)
