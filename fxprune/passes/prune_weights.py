"""PruneWeights: walks the observed layers in graph order, gathers each one's statistics and replaces its weights.

The statistics of a layer come from the prefix that is already pruned, so every layer can make up for the ones before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune import solvers
from fxprune.batch_store import BatchValues
from fxprune.calibration import CalibrationStream
from fxprune.errors import FxPruneError, SolverError
from fxprune.graph import input_of, module_of
from fxprune.layer_checkpoint import LayerCheckpoint
from fxprune.layer_solution import SolvedLayer, install, layer_of, observer_of, solve_layer
from fxprune.options import Options
from fxprune.passes.base import Pass
from fxprune.passes.insert_observers import TASK, LayerTask
from fxprune.passes.skip_connections import skip_operands
from fxprune.pattern import Pattern
from fxprune.precision import full_precision
from fxprune.report import LayerReport, PruneReport
from fxprune.statistics import CrossStatistics, InputStatistics
from fxprune.stopwatch import Stopwatch

LAYER = "fxprune"
REPORT = "fxprune_report"


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
        with torch.no_grad(), full_precision():
            report = self._solve_all(graph_module, tasks)
        layers = {node: node.meta.get(LAYER) or kept_layer(node, task) for node, task in tasks.items()}
        for node, layer in layers.items():
            node.meta[LAYER] = layer
        graph_module.meta[REPORT] = replace(report, layers=tuple(layers.values()))
        return PassResult(graph_module, any(layer.status != "kept" for layer in layers.values()))

    def _solve_all(self, graph_module: GraphModule, tasks: dict[Node, LayerTask]) -> PruneReport:
        """Solve layer after layer as the calibration set streams by; the report lacks only the layers."""
        device = next((p.device for p in graph_module.parameters()), torch.device("cpu"))
        stopwatch = Stopwatch(device)
        stream = CalibrationStream(
            graph_module,
            self.loader,
            device=device,
            stopwatch=stopwatch,
            memory_limit=self.options.memory_limit,
            observe_dense=self.options.inputs == "dense",
        )
        checkpoint = LayerCheckpoint.open(graph_module, self.pattern, self.method, self.options)
        to_solve = [node for node, task in tasks.items() if task.geometry is not None]
        solved: dict[Node, LayerReport] = {}
        for node in to_solve:
            self.on_layer(str(node.target), len(to_solve) + 1)
            layer = checkpoint.load(str(node.target))
            observer = observer_of(node)
            if layer is None:
                cross = self._gather(stream, node, tasks[node])
                checkpoint.check_data(stream.fingerprint)
                started = time.perf_counter()
                with stopwatch.measure("solve"):
                    layer = self._solve(node, tasks[node], observer.statistics(), cross)
                layer = replace(layer, seconds=time.perf_counter() - started)
                checkpoint.save(str(node.target), layer)
            else:
                observer.enabled = any(not checkpoint.has(str(user.target)) for user in input_of(node).users)
                stream.run_to(node)
                checkpoint.check_data(stream.fingerprint)
            solved[node] = self._install(graph_module, node, tasks[node], layer)
            if all(user in solved for user in input_of(node).users):
                observer.reset()  # Its Hessian is not needed any more.
        self.on_layer("output", len(to_solve) + 1)
        agreement = stream.finish()
        for node, report in solved.items():
            node.meta[LAYER] = replace(report, relative_error=stream.errors[node].relative)
        return PruneReport(
            layers=(),
            method=self.method,
            pattern=str(self.pattern),
            images=stream.images,
            timings=dict(stopwatch.seconds),
            peak_memory=stream.peak_bytes,
            agreement=agreement.agreement,
            kl=agreement.kl,
        )

    def _gather(self, stream: CalibrationStream, node: Node, task: LayerTask) -> CrossStatistics | None:
        """Stream up to a layer: its observer gathers H on the way, the cross term with the wanted output comes here."""
        geometry = task.geometry
        assert geometry is not None
        if self.options.target == "weights":
            stream.run_to(node)
            return None
        source = input_of(node)
        skips = skip_operands(node) if self.options.target == "skip" else ()
        cross = CrossStatistics.empty(geometry, stream.device)

        def visit(values: BatchValues) -> None:
            x = values.dense(source) if self.options.inputs == "dense" else values.pruned(source)
            y = values.dense(node)
            for skip in skips:
                dense, pruned = values.dense(skip), values.pruned(skip)
                if dense is not pruned and dense.shape == y.shape:
                    y = y + (dense - pruned)
            cross.update(geometry, x, y)

        stream.run_to(node, visit)
        return cross

    def _solve(
        self, node: Node, task: LayerTask, inputs: InputStatistics, cross: CrossStatistics | None
    ) -> SolvedLayer:
        assert task.geometry is not None
        pattern = (task.pattern or self.pattern) if task.role == "prune" else None
        try:
            return solve_layer(layer_of(node), task.geometry, inputs, cross, pattern, self.solver, self.options)
        except FxPruneError as error:
            raise SolverError(f"layer {node.target!r}: {error}") from error

    def _install(self, graph_module: GraphModule, node: Node, task: LayerTask, layer: SolvedLayer) -> LayerReport:
        """Give the layer its new weights and say so."""
        module = layer_of(node)
        install(module, layer)
        status: Literal["pruned", "reconstructed"] = "pruned" if task.role == "prune" else "reconstructed"
        self.record(graph_module, status, node, reason=task.reason)
        return LayerReport(
            name=str(node.target),
            op=type(module).__name__,
            shape=tuple(layer.weight.shape),
            pattern=str(task.pattern or self.pattern) if status == "pruned" else "",
            status=status,
            reason=task.reason,
            sparsity=zeros(layer.weight),
            damping=layer.damping,
            dead_inputs=layer.dead_inputs,
            seconds=layer.seconds,
        )


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
