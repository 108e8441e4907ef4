"""RemoveObservers: takes the observers out of the graph again; the layers read their inputs directly."""

from __future__ import annotations

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.calibration.observers import remove_observers
from fxprune.passes.base import Pass


class RemoveObservers(Pass):
    """Erases every HessianObserver call and its module."""

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        return PassResult(graph_module, remove_observers(graph_module))
