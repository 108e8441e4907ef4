"""What it costs at the network's output to solve one layer alone under a chain of constraints.

Every layer is solved under each of its chains against the dense model's statistics. What a solution costs is measured at the
output, with only that layer replaced: the squared change of the outputs relative to their variance. For a budget only every
second chain is measured there. The cost of the others is that of the nearest measured chain, scaled by the ratio of
the layer errors, since both are quadratic in a small change of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.annotations import annotation
from fxprune.calibration.batches import inputs_of, map_tensors, tensors_in
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.observers import observers_off
from fxprune.calibration.output_error import OutputError
from fxprune.calibration.stream import dense_statistics
from fxprune.errors import PatternError
from fxprune.geometry import LayerGeometry, laid_out_like
from fxprune.graph import Runner, device_of
from fxprune.layers.constraint import Chain, Part
from fxprune.layers.problem import layer_of, mean_product
from fxprune.layers.shared import modules_called, weight_calls
from fxprune.layers.solve import product, solve_chain
from fxprune.options import Method
from fxprune.runtime.precision import full_precision
from fxprune.runtime.processes import shared
from fxprune.solvers.problem import LayerProblem
from fxprune.statistics import InputStatistics

PROBE_IMAGES = 128
PROBE_EVERY = 2  # Chains apart.

Inputs = list[object]


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's chains cost.

    Attributes:
        costs: one for each chain: ||y_dense - y||^2 / ||y_dense - mean||^2 of the model's outputs; NaN for a chain of None.
        errors: the same of the layer's own output, the mean not removed.
        sparsities: shares of zeros among the weights.
        weights: number of weights of the layer.
    """

    costs: tuple[float, ...]
    errors: tuple[float, ...]
    sparsities: tuple[float, ...]
    weights: int


def sensitivities(
    graph_module: GraphModule,
    chains: Mapping[Node, Sequence[Chain | None]],
    calibration: Calibration,
    method: Method,
    *,
    probe_every: int = PROBE_EVERY,
) -> dict[Node, Sensitivity]:
    """Measure every chain on every layer; the graph is as it was afterwards.

    Args:
        graph_module: with observers in front of the layers.
        chains: for the call of each layer; an empty one leaves the layer dense and costs nothing, None stands for one that the
            layer cannot keep.
        calibration: all of it is read once; the output is measured on the first images.
        method: solver and options.
        probe_every: measure every so many-th chain at the output; 1 for all.

    Raises:
        PatternError: the model puts out no floating point tensor.
    """
    calibration.hold()
    with torch.inference_mode(), full_precision():
        with dense_statistics(graph_module, calibration, method.options, list(chains)) as statistics:
            with observers_off(graph_module):
                probe = probe_of(graph_module, calibration)
                dense = _outputs(graph_module, probe)
                calls, stages = weight_calls(graph_module), iter([len(chains)])

                def of_layer(node: Node) -> Sensitivity:
                    calibration.on_layer(f"scanning {node.target}", next(stages, 0))
                    of = statistics[node], chains[node], method, probe, dense, probe_every
                    return _of_layer(graph_module, node, calls[node], *of)

                return dict(zip(chains, shared(of_layer, list(chains)), strict=True))


def _of_layer(
    graph_module: GraphModule,
    node: Node,
    calls: tuple[Node, ...],
    inputs: InputStatistics,
    chains: Sequence[Chain | None],
    method: Method,
    probe: list[Inputs],
    dense: list[Tensor],
    probe_every: int,
) -> Sensitivity:
    module, options = layer_of(node), method.options
    geometry = annotation(node).geometry or LayerGeometry.of(module)
    weight = geometry.to_matrix(module.weight.detach()).double()
    hessian = inputs.hessian(centred=bool(options.bias_correction))
    problem = LayerProblem(hessian, weight @ hessian, weight).damped(options.damping)
    whole = Part(geometry, problem, weight)
    parts = [solve_chain(whole, chain, method) if chain else () for chain in chains]
    solutions = [product(geometry, of) if of else None for of in parts]
    none_lost, energy = problem.loss(weight).sum(), float((weight @ hessian * weight).sum())
    errors = [0.0 if s is None else max(0.0, float(problem.loss(s).sum() - none_lost)) for s in solutions]
    original, readers = module.weight.data, modules_called(calls)
    biases: list[Tensor | None] = [reader.bias for reader in readers]
    cost_per_error: dict[int, float] = {}
    for i, solution in list(enumerate(solutions))[::probe_every]:
        if solution is not None and errors[i] > 0:
            module.weight.data = laid_out_like(original, geometry.to_weight(solution))
            if options.bias_correction:
                shift = mean_product(geometry, weight - solution, inputs.mean).flatten().to(original)
                for reader, bias in zip(readers, biases, strict=True):
                    reader.bias = nn.Parameter(shift if bias is None else bias + shift)
            change = OutputError(channel_dim=1)
            for wanted, output in zip(dense, _outputs(graph_module, probe), strict=True):
                change.update(wanted, output)
            cost_per_error[i] = change.relative / errors[i]
            module.weight.data = original
            for reader, bias in zip(readers, biases, strict=True):
                reader.bias = bias
    costs = errors
    if cost_per_error:
        nearest = [min(cost_per_error, key=lambda i: abs(i - level)) for level in range(len(errors))]
        costs = [error * cost_per_error[i] for error, i in zip(errors, nearest, strict=True)]
    relative = tuple(error / energy if energy > 0 else 0.0 for error in errors)
    return Sensitivity(
        tuple(math.nan if chain is None else cost for chain, cost in zip(chains, costs, strict=True)),
        tuple(math.nan if chain is None else error for chain, error in zip(chains, relative, strict=True)),
        tuple(_sparsity(of) for of in parts),
        module.weight.numel(),
    )


def _sparsity(parts: Sequence[Part]) -> float:
    """Share of zeros in all parts together."""
    numel = sum(part.matrix.numel() for part in parts)
    return sum(int((part.matrix == 0).sum()) for part in parts) / numel if numel else 0.0


def probe_of(graph_module: GraphModule, calibration: Calibration) -> list[Inputs]:
    """The model's arguments in the first batches, PROBE_IMAGES together."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    probe: list[Inputs] = []
    device = device_of(graph_module)
    for number, batch in enumerate(calibration.fitted_head(PROBE_IMAGES)):
        probe.append(list(inputs_of(batch, placeholders, number, device=device).values()))
    return probe


def _outputs(graph_module: GraphModule, probe: list[Inputs]) -> list[Tensor]:
    """All floating point tensors, (N, ...) each, that the model puts out for a batch, as one (N, K); for each batch."""
    outputs = []
    for inputs in probe:
        leaves = tensors_in(Runner(graph_module).run(*map_tensors(inputs, torch.clone)))
        tensors = [x.flatten(1) for x in leaves if x.is_floating_point() and x.dim()]
        if not tensors:
            raise PatternError(
                "what a layer costs is measured at the model's output, which holds no floating point tensor; "
                "use a pattern that is the same for every layer"
            )
        outputs.append(torch.cat(tensors, 1))
    return outputs
