"""What `fxprune.compile` returns: a GraphModule that carries its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.fx import GraphModule

from fxprune.annotations import annotate_graph, annotation, report_of
from fxprune.export.deployment import assess_deployment
from fxprune.layers.kept import layers_inside
from fxprune.report import LayerReport, PruneReport


class CompiledModule(GraphModule):
    """A pruned `torch.fx.GraphModule`: call it, move it, export it; `.report` says what was done to each layer."""

    @classmethod
    def of(cls, graph_module: GraphModule, seconds: float, warnings: Sequence[str] = ()) -> CompiledModule:
        """The same graph and modules, and the report that `SolveLayers` left, with the time and warnings of the whole run."""
        compiled = cls(graph_module, graph_module.graph, graph_module._get_name())
        compiled.meta.update(graph_module.meta)
        report = report_of(graph_module) or _untouched(graph_module)
        layers = tuple(_with_verdict(layer, compiled) for layer in report.layers)
        annotate_graph(compiled, report=replace(report, layers=layers, seconds=seconds, warnings=tuple(warnings)))
        compiled.eval()
        return compiled

    @property
    def report(self) -> PruneReport:
        """What was done to each layer, and what the run cost."""
        report = report_of(self)
        assert report is not None
        return report


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
    assert isinstance(module.weight, Tensor)
    verdict = assess_deployment(module.weight, op=layer.op, groups=getattr(module, "groups", 1)).verdict
    return replace(layer, verdict=verdict)
