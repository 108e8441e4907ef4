"""PruneWeights: walks the observed layers in graph order, gathers each one's statistics and replaces its weights.

The statistics of a layer come from the prefix that is already pruned, so every layer can make up for the ones before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune import solvers
from fxprune.calibration import BatchValues, CalibrationStream, OutputAgreement
from fxprune.errors import FxPruneError, SolverError
from fxprune.geometry import LayerGeometry
from fxprune.graph import input_of, module_of
from fxprune.options import Options
from fxprune.passes.base import Pass
from fxprune.passes.insert_observers import TASK, LayerTask
from fxprune.passes.skip_connections import skip_operands
from fxprune.pattern import Pattern
from fxprune.report import LayerReport, PruneReport
from fxprune.solvers import LayerProblem, Solver, refit
from fxprune.statistics import CrossStatistics, HessianObserver, InputStatistics

LAYER = "fxprune"
REPORT = "fxprune_report"


@dataclass(frozen=True)
class SolvedLayer:
    """New parameters of a layer: weight (R, C/G, *kernel), bias (R,) or None, and how they came about."""

    weight: Tensor
    bias: Tensor | None
    damping: float
    dead_inputs: int


class PruneWeights(Pass):
    """Replaces the weights (and biases) of all layers that have an observer; leaves a LayerReport on every layer.

    Args:
        pattern: the sparsity pattern.
        method: name of a solver in `fxprune.solvers`.
        loader: calibration batches, read once.
        options: resolved options (`Options.resolved`).
        on_layer: called with each layer's name and the number of stages before it is solved (for progress bars).
    """

    def __init__(
        self,
        pattern: Pattern,
        method: str,
        loader: Iterable[Any],
        options: Options,
        *,
        on_layer: Callable[[str, int], None] = lambda name, stages: None,
    ) -> None:
        self.pattern = pattern
        self.method = method
        self.solver = solvers.get(method)
        self.loader = loader
        self.options = options
        self.on_layer = on_layer

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        tasks = {n: n.meta[TASK] for n in graph_module.graph.nodes if TASK in n.meta and LAYER not in n.meta}
        if not tasks and REPORT in graph_module.meta:
            return PassResult(graph_module, False)
        with torch.no_grad():
            report = self._solve_all(graph_module, tasks)
        layers = {node: node.meta.get(LAYER) or kept_layer(node, task) for node, task in tasks.items()}
        for node, layer in layers.items():
            node.meta[LAYER] = layer
        graph_module.meta[REPORT] = replace(report, layers=tuple(layers.values()))
        return PassResult(graph_module, any(layer.status != "kept" for layer in layers.values()))

    def _solve_all(self, graph_module: GraphModule, tasks: dict[Node, LayerTask]) -> PruneReport:
        """Solve layer after layer as the calibration set streams by; the report lacks only the layers."""
        device = next((p.device for p in graph_module.parameters()), torch.device("cpu"))
        stream = CalibrationStream(
            graph_module, self.loader, device=device, observe_dense=self.options.inputs == "dense"
        )
        observed = [node for node, task in tasks.items() if task.geometry is not None]
        solved: dict[Node, LayerReport] = {}
        for node in observed:
            self.on_layer(str(node.target), len(observed) + 1)
            cross = self._gather(stream, node, tasks[node].geometry)
            solved[node] = self._replace(graph_module, node, tasks[node], cross)
        self.on_layer("output", len(observed) + 1)
        outputs = OutputAgreement()
        stream.finish(outputs.update)
        for node, layer in solved.items():
            node.meta[LAYER] = replace(layer, relative_error=stream.errors[node].relative)
        solving = sum(layer.seconds for layer in solved.values())
        return PruneReport(
            layers=(),
            method=self.method,
            pattern=str(self.pattern),
            images=stream.images,
            timings={"stream": stream.seconds, "solve": solving},
            peak_memory=stream.peak_bytes,
            agreement=outputs.agreement,
            kl=outputs.kl,
        )

    def _gather(self, stream: CalibrationStream, node: Node, geometry: LayerGeometry | None) -> CrossStatistics | None:
        """Stream up to a layer; its observer gathers H on the way, the cross term with the wanted output is gathered here."""
        if self.options.target == "weights":
            stream.run_to(node, lambda values: None)
            return None
        assert geometry is not None
        source = input_of(node)
        skips = skip_operands(node) if self.options.target == "skip" else ()
        cross: list[CrossStatistics] = []

        def visit(values: BatchValues) -> None:
            x = values.dense(source) if self.options.inputs == "dense" else values.pruned(source)
            y = values.dense(node)
            for skip in skips:
                dense, pruned = values.dense(skip), values.pruned(skip)
                if dense is not pruned and dense.shape == y.shape:
                    y = y + (dense - pruned)
            if not cross:
                cross.append(CrossStatistics.empty(geometry, x.device))
            cross[0].update(geometry, x, y)

        stream.run_to(node, visit)
        return cross[0]

    def _replace(
        self, graph_module: GraphModule, node: Node, task: LayerTask, cross: CrossStatistics | None
    ) -> LayerReport:
        """Solve one layer and give it its new weights."""
        started = time.perf_counter()
        module, observer = module_of(node), module_of(input_of(node))
        assert isinstance(observer, HessianObserver)
        assert module is not None and task.geometry is not None
        pattern = self.pattern if task.role == "prune" else None
        try:
            layer = solve_layer(module, task.geometry, observer.statistics(), cross, pattern, self.solver, self.options)
        except FxPruneError as error:
            raise SolverError(f"layer {node.target!r}: {error}") from error
        _install(module, layer)
        status: Literal["pruned", "reconstructed"] = "pruned" if pattern else "reconstructed"
        self.record(graph_module, status, node)
        return LayerReport(
            name=str(node.target),
            op=type(module).__name__,
            shape=tuple(layer.weight.shape),
            pattern=str(pattern or ""),
            status=status,
            reason=task.reason,
            sparsity=zeros(layer.weight),
            damping=layer.damping,
            dead_inputs=layer.dead_inputs,
            seconds=time.perf_counter() - started,
        )


def solve_layer(
    module: nn.Module,
    geometry: LayerGeometry,
    inputs: InputStatistics,
    cross: CrossStatistics | None,
    pattern: Pattern | None,
    solver: Solver,
    options: Options,
) -> SolvedLayer:
    """Pose and solve one layer's problem from its statistics.

    Args:
        module: the layer, with its dense weights.
        geometry: of the layer.
        inputs: moments of the patches.
        cross: cross moment of the wanted output, or None where that is the layer's own output on those inputs.
        pattern: None re-fits the layer without a pattern.
        solver: chooses the weights to keep.
        options: resolved options.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    dense = geometry.to_matrix(weight.detach()).double()
    centred = bool(options.bias_correction)
    hessian = inputs.hessian(centred=centred)
    target = dense @ hessian if cross is None else cross.target(inputs, bias, centred=centred)
    problem = LayerProblem(hessian, target, dense).damped(options.damping)
    if pattern is None:
        matrix = problem.optimum()
    else:
        solved = []
        for group in problem.groups():
            sparse = solver(group, pattern)
            solved.append(refit(group, sparse != 0, start=sparse) if options.refit else sparse)
        matrix = torch.stack(solved)
    if not torch.isfinite(matrix).all():
        raise SolverError("the solution holds NaN or infinite values; use more calibration images, or more damping")
    if centred:
        # The mean of the wanted output less the mean that the new weights give.
        wanted = cross.mean if cross is not None else _mean_output(dense, bias, inputs)
        bias = (wanted - torch.einsum("grd,gd->gr", matrix, inputs.mean)).flatten()
    dead = int((inputs.gram.diagonal(dim1=1, dim2=2) == 0).sum())
    new_bias = None if bias is None else bias.detach().to(weight)
    return SolvedLayer(geometry.to_weight(matrix).to(weight), new_bias, problem.damping, dead)


def _mean_output(dense: Tensor, bias: Tensor | None, inputs: InputStatistics) -> Tensor:
    mean = torch.einsum("grd,gd->gr", dense, inputs.mean)
    return mean if bias is None else mean + bias.to(mean).reshape(mean.shape)


def _install(module: nn.Module, layer: SolvedLayer) -> None:
    """Give the module its new parameters."""
    assert isinstance(module.weight, nn.Parameter)
    module.weight.data = layer.weight
    if layer.bias is not None:
        module.bias = nn.Parameter(layer.bias, requires_grad=module.weight.requires_grad)


def zeros(weight: Tensor) -> float:
    """Share of zeros."""
    return float((weight == 0).double().mean())


def kept_layer(node: Node, task: LayerTask) -> LayerReport:
    """The report of a layer that was not touched."""
    module = module_of(node)
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    name = node.name if module is None else str(node.target)
    op = getattr(node.target, "__name__", str(node.target)) if module is None else type(module).__name__
    sparsity = zeros(weight) if isinstance(weight, Tensor) else 0.0
    return LayerReport(name=name, op=op, shape=shape, reason=task.reason, sparsity=sparsity)
