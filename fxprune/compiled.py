"""What `fxprune.compile` returns: a GraphModule that carries its report."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from fxprune.annotations import KEY, annotate_graph, annotation, report_of
from fxprune.errors import GraphError
from fxprune.fine_tuning.recorded_zeros import current_report, record_zeros
from fxprune.geometry import reduction_second
from fxprune.layers.deployment import assess_deployment
from fxprune.layers.kept import layers_inside
from fxprune.layers.zero_keeper import attach_again
from fxprune.report import LayerReport, PruneReport


class CompiledModule(GraphModule):
    """A pruned `torch.fx.GraphModule`: call it, move it, export it; `.report` says what was done to each layer.

    Copies keep the report: `copy.copy`, `copy.deepcopy`, pickle, `torch.save` of the whole, `.to` and `.half`. What torch
    makes of it anew does not (`torch.fx.symbolic_trace`, `torch.export`, `torch.jit`).
    """

    __jit_unused_properties__ = [*GraphModule.__jit_unused_properties__, "report"]  # noqa: RUF012 - as torch declares it

    @classmethod
    def of(
        cls, graph_module: GraphModule, seconds: float, warnings: Sequence[str] = (), given: str = ""
    ) -> CompiledModule:
        """The same graph and modules, and the report that `SolveLayers` left, with what is known of the whole run."""
        compiled = cls(graph_module, graph_module.graph, type(graph_module).__name__)
        compiled.meta.update(graph_module.meta)
        report = report_of(graph_module) or _untouched(graph_module)
        layers = tuple(_with_verdict(layer, compiled) for layer in report.layers)
        report = replace(report, layers=layers, seconds=seconds, warnings=tuple(warnings), given=given)
        annotate_graph(compiled, report=report, zeros=record_zeros(compiled, layers))
        compiled.eval()
        return compiled

    @property
    def report(self) -> PruneReport:
        """What was done to each layer, and what the run cost.

        Raises:
            GraphError: the model carries none: it was saved without, or assembled by hand.
        """
        report = current_report(self)
        if report is None:
            raise GraphError(
                f"this {type(self).__name__} carries no report: it was not made by fxprune.compile or fxprune.low_rank, or it "
                "was traced or exported again after that; take the report of the model that they returned"
            )
        return report

    def __copy__(self) -> CompiledModule:
        copied = CompiledModule(self, self.graph, type(self).__name__)
        copied.meta.update(self.meta)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        copied = super().__deepcopy__(memo)
        type(copied).__name__ = type(self).__name__
        attach_again(copied)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # GraphModule pickles the code and traces it again, which loses what passes noted down on the graph.
        state = {name: value for name, value in self.__dict__.items() if name not in ("_graph", "_code")}
        return _unpickled, (
            type(self).__name__,
            state,
            [_NodeState.of(node) for node in self.graph.nodes],
            self.graph._codegen,
        )


@dataclass(frozen=True)
class _NodeState:
    """One node for pickle; other nodes in its arguments are `_Reference`, operators of torch.ops their names."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    type: Any
    meta: dict[str, Any]

    @classmethod
    def of(cls, node: Node) -> _NodeState:
        args, kwargs = (map_aggregate(given, _to_state) for given in (node.args, node.kwargs))
        meta = {key: value for key, value in node.meta.items() if key == KEY}
        return cls(node.name, node.op, _to_state(node.target), args, kwargs, node.type, meta)


@dataclass(frozen=True)
class _Reference:
    """A node, by name."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator of torch.ops, which pickle cannot store, by name: aten.add.Tensor."""

    name: str


@dataclass(frozen=True)
class _Function:
    """A function by its module and name, where pickle looks for it elsewhere: F.max_pool2d is made inside another one."""

    module: str
    name: str


def _to_state(value: Any) -> Any:
    if isinstance(value, Node):
        return _Reference(value.name)
    if isinstance(value, OpOverload | OpOverloadPacket):
        return _Operator(str(value))
    if isinstance(value, FunctionType) and "<locals>" in value.__qualname__:
        function = _Function(value.__module__, value.__name__)
        if getattr(sys.modules.get(function.module), function.name, None) is value:
            return function
    return value


def _unpickled(name: str, state: dict[str, Any], nodes: list[_NodeState], codegen: Any) -> CompiledModule:
    graph = Graph()
    made: dict[str, Node] = {}

    def from_state(value: Any) -> Any:
        if isinstance(value, _Reference):
            return made[value.name]
        if isinstance(value, _Function):
            return getattr(importlib.import_module(value.module), value.name)
        if not isinstance(value, _Operator):
            return value
        found: Any = torch.ops
        for part in value.name.replace("::", ".").split("."):
            found = getattr(found, part)
        return found

    for node in nodes:
        args, kwargs = (map_aggregate(given, from_state) for given in (node.args, node.kwargs))
        made[node.name] = graph.create_node(node.op, from_state(node.target), args, kwargs, node.name, node.type)
        made[node.name].meta.update(node.meta)
    graph.set_codegen(codegen)
    compiled = CompiledModule(nn.Module(), Graph(), name)
    compiled.__dict__.update(state)
    compiled.graph = graph
    return compiled


def _untouched(graph_module: GraphModule) -> PruneReport:
    """The report of a graph whose layers no pass has solved."""
    layers: list[LayerReport] = []
    for node in graph_module.graph.nodes:
        done = annotation(node).report
        layers += [done] if done is not None else layers_inside(node)
    return PruneReport(tuple(layers), method="", pattern="")


def _with_verdict(layer: LayerReport, graph_module: GraphModule) -> LayerReport:
    """The report of a pruned layer with what its zeros are worth where it runs."""
    if not layer.pattern:
        return layer
    module = graph_module.get_submodule(layer.name)
    verdict = assess_deployment(reduction_second(module), op=layer.op, groups=getattr(module, "groups", 1)).verdict
    return replace(layer, verdict=verdict)
