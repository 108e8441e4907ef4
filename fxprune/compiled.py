"""What `fxprune.compile` returns: a GraphModule that carries its report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fxprune.export.deployment import assess_deployment
from fxprune.fine_tuning.keeper import attach_again
from fxprune.fine_tuning.recorded_zeros import ZEROS, current_report, record_zeros
from fxprune.passes.prune_weights import REPORT
from fxprune.report import LayerReport, PruneReport


class CompiledModule(GraphModule):
    """A pruned `torch.fx.GraphModule`: call it, move it, export it; `.report` says what was done to each layer."""

    @classmethod
    def of(cls, graph_module: GraphModule, *, seconds: float) -> CompiledModule:
        """The same graph and modules, and the report that `PruneWeights` left, with the time of the whole run."""
        compiled = cls(graph_module, graph_module.graph, graph_module._get_name())
        compiled.meta.update(graph_module.meta)
        report: PruneReport = graph_module.meta[REPORT]
        layers = tuple(_with_verdict(layer, compiled) for layer in report.layers)
        compiled.meta[REPORT] = replace(report, layers=layers, seconds=seconds)
        compiled.meta[ZEROS] = record_zeros(compiled, layers)
        compiled.eval()
        return compiled

    @property
    def report(self) -> PruneReport:
        """What was done to each layer, what the run cost, and whether the zeros have been filled in since."""
        report = current_report(self)
        assert report is not None
        return report

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, CompiledModule)
        attach_again(copied)
        return copied


def _with_verdict(layer: LayerReport, graph_module: GraphModule) -> LayerReport:
    """The report of a pruned layer with what its zeros are worth where it runs."""
    if not layer.pattern:
        return layer
    module = graph_module.get_submodule(layer.name)
    assert isinstance(module.weight, Tensor)
    verdict = assess_deployment(module.weight, op=layer.op, groups=getattr(module, "groups", 1)).verdict
    return replace(layer, verdict=verdict)
