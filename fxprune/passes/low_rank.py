"""LowRank: replaces convolutions and linear layers by two smaller ones each, where that saves multiply-adds.

Like PruneWeights it takes a layer's statistics from the prefix that is already compressed, so that every layer can make
up for the ones before it; layers that stay whole are re-fitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.calibration.batches import read_all
from fxprune.calibration.observers import observer_of
from fxprune.calibration.stream import CalibrationStream
from fxprune.errors import FxPruneError, OptionsError, SolverError
from fxprune.graph import module_of
from fxprune.layer_solution import dead_inputs, fitted_bias, install, layer_of, pose_problem, solve_layer
from fxprune.options import Options
from fxprune.passes.base import Pass
from fxprune.passes.insert_observers import TASK, LayerTask
from fxprune.passes.kept_layers import kept_layer, layers_inside
from fxprune.passes.prune_weights import LAYER, REPORT
from fxprune.passes.wanted_output import cross_statistics
from fxprune.precision import full_precision
from fxprune.ranks import Choice, Method, RankPlan, RankRule, Split, check_plan, splits_of, survey
from fxprune.ranks.splits import factored, split_call
from fxprune.report import LayerReport, PruneReport
from fxprune.solvers import LayerProblem
from fxprune.solvers.low_rank import Factors, data_aware_factors, plain_factors, refit_second
from fxprune.solvers.spatial_split import (
    SpatialFactors,
    data_aware_spatial_factors,
    plain_spatial_factors,
    refit_second_kernel,
)
from fxprune.statistics import CrossStatistics


class LowRank(Pass):
    """Factors the layers that `InsertObservers(Factorable(...))` observed; leaves a LayerReport on every layer.

    1. Ranks are chosen on the dense model, unless a plan is given.
    2. In graph order each layer is solved against the dense model's output and replaced. One for which no rank was
       chosen is re-fitted whole, if the options say so.
    3. In the graph, the call of `conv` becomes calls of `conv.0` and `conv.1`; only the second has a bias.

    Args:
        loader: calibration batches, read once and held in memory.
        options: resolved options (`fxprune.ranks.low_rank_options`).
        rank: a `RankRule`, its text, or a `RankPlan`.
        method: "data_aware" (least output error), or "svd" (least error of the weight).
        split: "channel", "spatial", or "auto": whichever is better for each layer.
        multiple: ranks are multiples of it. With 4 the new layers can be pruned 2:4; 16 suits the kernels of most CPUs.
        on_layer: called with each layer's name and the number of stages before it is solved (for progress bars).
    """

    def __init__(
        self,
        loader: Iterable[Any],
        options: Options,
        *,
        rank: str | RankRule | RankPlan = "multiply_adds:0.7",
        method: Method = "data_aware",
        split: Split | Literal["auto"] = "auto",
        multiple: int = 4,
        on_layer: Callable[[str, int], None] = lambda name, stages: None,
    ) -> None:
        if multiple < 1:
            raise OptionsError(f"multiple is {multiple}; ranks are multiples of it, so it should be at least 1")
        self.loader = loader
        self.options = options
        self.rank = rank if isinstance(rank, RankPlan) else RankRule.parse(rank)
        self.method: Method = method
        self.splits = splits_of(split)
        self.multiple = multiple
        self.on_layer = on_layer
        self._uses_inputs = method == "data_aware" or options.refit or options.bias_correction

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        tasks = {n: n.meta[TASK] for n in graph_module.graph.nodes if TASK in n.meta and LAYER not in n.meta}
        if not tasks and REPORT in graph_module.meta:
            return PassResult(graph_module, False)
        batches = read_all(self.loader)
        _keep_hooked_layers(tasks)
        with torch.no_grad(), full_precision():
            plan = self.rank if isinstance(self.rank, RankPlan) else self._plan(graph_module, batches, self.rank)
            check_plan(plan, {str(node.target): task for node, task in tasks.items()})
            report = self._solve_all(graph_module, tasks, batches, plan)
        layers: list[LayerReport] = []
        for node in list(graph_module.graph.nodes):
            if node in tasks and LAYER not in node.meta:
                reason = tasks[node].reason or plan.reason(str(node.target))
                node.meta[LAYER] = kept_layer(node, reason)
                self.record(graph_module, "kept", node, reason=reason)
            layers += [node.meta[LAYER]] if LAYER in node.meta else layers_inside(node)
            if node in tasks and node.meta[LAYER].status == "factored":
                self._split_call(graph_module, node)
        graph_module.meta[REPORT] = replace(report, layers=tuple(layers))
        return PassResult(graph_module, any(layer.status != "kept" for layer in layers))

    def _plan(self, graph_module: GraphModule, batches: Sequence[Any], rule: RankRule) -> RankPlan:
        self.on_layer("choosing ranks", 0)
        found = survey(
            graph_module,
            batches,
            method=self.method,
            splits=self.splits,
            multiple=self.multiple,
            options=self.options,
        )
        return rule.plan(found)

    def _solve_all(
        self, graph_module: GraphModule, tasks: Mapping[Node, LayerTask], batches: Sequence[Any], plan: RankPlan
    ) -> PruneReport:
        """Solve layer after layer as the calibration set streams by; the report lacks only the layers."""
        stream = CalibrationStream.by(self.options, graph_module, batches)
        to_solve = [
            node
            for node, task in tasks.items()
            if task.geometry is not None and (self.options.reconstruct or plan.choice(str(node.target)))
        ]
        observers = {observer_of(node) for node, task in tasks.items() if task.geometry is not None}
        for observer in observers - {observer_of(node) for node in to_solve if self._uses_inputs}:
            observer.enabled = False
        solved: dict[Node, LayerReport] = {}
        for node in to_solve:
            self.on_layer(str(node.target), len(to_solve) + 1)
            cross = cross_statistics(stream, node, tasks[node], self.options)
            with stream.stopwatch.measure("solve"):
                try:
                    solved[node] = self._solve(graph_module, node, tasks[node], cross, plan)
                except FxPruneError as error:
                    raise SolverError(f"layer {node.target!r}: {error}") from error
        self.on_layer("output", len(to_solve) + 1)
        agreement = stream.finish()
        for observer in observers:
            observer.reset()
            observer.enabled = True
        for node, layer in solved.items():
            node.meta[LAYER] = replace(layer, relative_error=stream.errors[node].relative)
        return PruneReport(
            layers=(),
            method=self.method,
            pattern=plan.rule,
            images=stream.source.images,
            images_read=stream.source.images_read,
            timings=dict(stream.stopwatch.seconds),
            peak_memory=stream.peak_bytes,
            agreement=agreement.agreement,
            kl=agreement.kl,
            multiply_adds=plan.multiply_adds,
        )

    def _solve(
        self,
        graph_module: GraphModule,
        node: Node,
        task: LayerTask,
        cross: CrossStatistics | None,
        plan: RankPlan,
    ) -> LayerReport:
        """Solve one layer; put the two new ones, or new weights, in its place."""
        started = time.perf_counter()
        name, module, geometry = str(node.target), layer_of(node), task.geometry
        assert geometry is not None
        choice = plan.choice(name)
        report = LayerReport(name=name, op=type(module).__name__, shape=tuple(module.weight.shape))
        if choice is None:
            layer = solve_layer(module, geometry, observer_of(node).statistics(), cross, None, None, self.options)
            install(module, layer)
            reason = task.reason or plan.reason(name)
            self.record(graph_module, "reconstructed", node, reason=reason)
            report = replace(report, status="reconstructed", reason=reason, damping=layer.damping)
            return replace(report, dead_inputs=layer.dead_inputs, seconds=time.perf_counter() - started)
        weight, bias = geometry.to_matrix(module.weight.detach()).double()[0], module.bias
        kernel = geometry.kernel_size if choice.split == "spatial" else ()
        if self._uses_inputs:
            inputs = observer_of(node).statistics()
            problem = pose_problem(module, geometry, inputs, cross, self.options)
            group = next(problem.groups())
            factors = self._factors(weight, group, choice, kernel)
            bias = fitted_bias(module, geometry, factors.product[None], inputs, cross, self.options)
            report = replace(report, damping=problem.damping, dead_inputs=dead_inputs(inputs))
        else:
            factors = self._factors(weight, None, choice, kernel)
        if not torch.isfinite(factors.product).all():
            raise SolverError("its factors hold NaN or infinite values; use more calibration images, or more damping")
        pair = factored(module, choice.split, factors.first, factors.second, bias)
        graph_module.set_submodule(name, pair)
        return replace(
            report,
            status="factored",
            reason=f"{choice.split} split",
            rank=choice.rank,
            multiply_adds=(plan.layers[name].multiply_adds, choice.multiply_adds),
            seconds=time.perf_counter() - started,
        )

    def _factors(
        self, weight: Tensor, problem: LayerProblem | None, choice: Choice, kernel: tuple[int, ...]
    ) -> Factors | SpatialFactors:
        """Factors of a weight (R, D); for a spatial split, `kernel` is (ky, kx)."""
        refit = problem if self.options.refit else None
        if len(kernel) == 2:
            size = (kernel[0], kernel[1])
            if self.method == "data_aware" and problem is not None:
                return data_aware_spatial_factors(problem, size, choice.rank)
            split = plain_spatial_factors(weight, size, choice.rank)
            return replace(split, second=refit_second_kernel(refit, size, split.first)) if refit else split
        if self.method == "data_aware" and problem is not None:
            return data_aware_factors(problem, choice.rank)
        plain = plain_factors(weight, choice.rank)
        return replace(plain, second=refit_second(refit, plain.first)) if refit else plain

    def _split_call(self, graph_module: GraphModule, node: Node) -> None:
        """Turn the call of an nn.Sequential of two layers into two calls."""
        layer: LayerReport = node.meta[LAYER]
        second = split_call(node)
        second.meta[LAYER] = layer
        self.record(graph_module, "replaced", node, into=second.name, reason=f"rank {layer.rank}, {layer.reason}")
        graph_module.graph.erase_node(node)


def _keep_hooked_layers(tasks: dict[Node, LayerTask]) -> None:
    """Let layers with hooks stay whole: the two new layers would not have them."""
    for node, task in tasks.items():
        module = module_of(node)
        if task.role == "prune" and module is not None and (module._forward_hooks or module._forward_pre_hooks):
            tasks[node] = node.meta[TASK] = replace(task, role="reconstruct", reason="its forward hooks would be lost")
