"""What `fxprune.compile` returns: a GraphModule that carries its report."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from fxprune.passes.prune_weights import REPORT
from fxprune.report import PruneReport


class CompiledModule(GraphModule):
    """A pruned `torch.fx.GraphModule`: call it, move it, export it; `.report` says what was done to each layer."""

    @classmethod
    def of(cls, graph_module: GraphModule, *, seconds: float) -> CompiledModule:
        """The same graph and modules, and the report that `PruneWeights` left, with the time of the whole run."""
        compiled = cls(graph_module, graph_module.graph, graph_module._get_name())
        compiled.meta.update(graph_module.meta)
        compiled.meta[REPORT] = replace(graph_module.meta[REPORT], seconds=seconds)
        compiled.eval()
        return compiled

    @property
    def report(self) -> PruneReport:
        """What was done to each layer, and what the run cost."""
        report = self.meta[REPORT]
        assert isinstance(report, PruneReport)
        return report
