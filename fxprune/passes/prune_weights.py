"""PruneWeights: walks the observed layers in graph order, gathers each one's statistics and replaces its weights.

The statistics of a layer come from the prefix that is already pruned, so every layer can make up for the ones before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune import solvers
from fxprune.calibration.observers import observer_of
from fxprune.calibration.stopwatch import Stopwatch
from fxprune.calibration.stream import CalibrationStream
from fxprune.errors import FxPruneError, SolverError
from fxprune.graph import input_of
from fxprune.layer_checkpoint import LayerCheckpoint
from fxprune.layer_solution import SolvedLayer, install, layer_of, solve_layer
from fxprune.options import Options
from fxprune.passes.base import Pass
from fxprune.passes.destination import destination, skip_operands
from fxprune.passes.insert_observers import TASK, LayerTask
from fxprune.passes.kept_layers import kept_layer, layers_inside, zeros
from fxprune.passes.wanted_output import cross_statistics, rectified_statistics
from fxprune.pattern import Pattern
from fxprune.precision import full_precision
from fxprune.report import LayerReport, PruneReport
from fxprune.statistics import CrossStatistics, InputStatistics

LAYER = "fxprune"
REPORT = "fxprune_report"


def unaffected(graph_module: GraphModule, tasks: Mapping[Node, LayerTask]) -> list[Node]:
    """The layers to be re-fitted whose dense weights are the answer: no pruned layer feeds them, or what they are added to."""
    changed: set[Node] = set()
    found = []
    for node in graph_module.graph.nodes:
        task = tasks.get(node)
        sources = {*node.all_input_nodes}
        if task is not None and task.role == "reconstruct":
            if changed.isdisjoint({*sources, *skip_operands(node)}):
                found.append(node)
            else:
                changed.add(node)
        elif not changed.isdisjoint(sources) or (task is not None and task.role == "prune"):
            changed.add(node)
    return found


class PruneWeights(Pass):
    """Replaces the weights (and biases) of all layers that have an observer; leaves a LayerReport on every layer.

    Args:
        pattern: the sparsity pattern.
        method: name of a solver in `fxprune.solvers`.
        loader: calibration batches, read once.
        options: resolved options (`Options.resolved`).
        on_layer: called with each layer's name and the number of stages before it is solved (for progress bars).
        stopwatch: takes the time of "stream", "statistics" and "solve".
    """

    def __init__(
        self,
        pattern: Pattern,
        method: str,
        loader: Iterable[Any],
        options: Options,
        *,
        on_layer: Callable[[str, int], None] = lambda name, stages: None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.pattern = pattern
        self.method = method
        self.solver = solvers.get(method)
        self.loader = loader
        self.options = options
        self.on_layer = on_layer
        self.stopwatch = stopwatch

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        tasks = {n: n.meta[TASK] for n in graph_module.graph.nodes if TASK in n.meta and LAYER not in n.meta}
        if not tasks and REPORT in graph_module.meta:
            return PassResult(graph_module, False)
        with torch.no_grad(), full_precision():
            report = self._solve_all(graph_module, tasks)
        layers: list[LayerReport] = []
        for node in graph_module.graph.nodes:
            if node in tasks:
                node.meta.setdefault(LAYER, kept_layer(node, tasks[node].reason))
            layers += [node.meta[LAYER]] if LAYER in node.meta else layers_inside(node)
        graph_module.meta[REPORT] = replace(report, layers=tuple(layers))
        return PassResult(graph_module, any(layer.status != "kept" for layer in layers))

    def _solve_all(self, graph_module: GraphModule, tasks: dict[Node, LayerTask]) -> PruneReport:
        """Solve layer after layer as the calibration set streams by; the report lacks only the layers."""
        stream = CalibrationStream.by(self.options, graph_module, self.loader, self.stopwatch)
        checkpoint = LayerCheckpoint.open(graph_module, self.pattern, self.method, self.options)
        exact = unaffected(graph_module, tasks)
        to_solve = [node for node, task in tasks.items() if task.geometry is not None and node not in exact]
        for node in exact:
            observer_of(node).enabled = any(user not in exact for user in input_of(node).users)
            same = SolvedLayer(layer_of(node).weight.data, None, damping=0.0, dead_inputs=0)
            report = self._install(graph_module, node, tasks[node], same)
            node.meta[LAYER] = replace(report, relative_error=0.0, damping=None)
        solved: dict[Node, LayerReport] = {}
        for node in to_solve:
            self.on_layer(str(node.target), len(to_solve) + 1)
            layer = checkpoint.load(str(node.target))
            observer = observer_of(node)
            if layer is None:
                cross = cross_statistics(stream, node, tasks[node], self.options)
                checkpoint.check_data(stream.source.fingerprint)
                started = time.perf_counter()
                with stream.stopwatch.measure("statistics"):
                    inputs = observer.statistics()
                with stream.stopwatch.measure("solve"):
                    layer = self._solve(stream, node, tasks[node], inputs, cross)
                layer = replace(layer, seconds=time.perf_counter() - started)
                checkpoint.save(str(node.target), layer)
            else:
                observer.enabled = any(not checkpoint.has(str(user.target)) for user in input_of(node).users)
                stream.run_to(node)
                checkpoint.check_data(stream.source.fingerprint)
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
            images=stream.source.images,
            images_read=stream.source.images_read,
            timings=dict(stream.stopwatch.seconds),
            peak_memory=stream.peak_bytes,
            agreement=agreement.agreement,
            kl=agreement.kl,
        )

    def _solve(
        self,
        stream: CalibrationStream,
        node: Node,
        task: LayerTask,
        inputs: InputStatistics,
        cross: CrossStatistics | None,
    ) -> SolvedLayer:
        geometry, module = task.geometry, layer_of(node)
        assert geometry is not None
        pattern = (task.pattern or self.pattern) if task.role == "prune" else None
        rectified = None
        if self.options.target == "rectified" and cross is not None and destination(node).rectifier:
            rectified = partial(rectified_statistics, stream, node, geometry, cross)
        try:
            return solve_layer(module, geometry, inputs, cross, pattern, self.solver, self.options, rectified)
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
