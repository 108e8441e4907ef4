"""RemoveObservers: takes the observers out of the graph again; the layers read their inputs directly."""

from __future__ import annotations

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph import input_of, module_of
from fxprune.passes.base import Pass
from fxprune.passes.insert_observers import OBSERVERS
from fxprune.statistics import HessianObserver


class RemoveObservers(Pass):
    """Erases every HessianObserver call and its module."""

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        observers = [n for n in graph_module.graph.nodes if isinstance(module_of(n), HessianObserver)]
        for node in observers:
            node.replace_all_uses_with(input_of(node))
            graph_module.graph.erase_node(node)
        if hasattr(graph_module, OBSERVERS):
            delattr(graph_module, OBSERVERS)
        return PassResult(graph_module, bool(observers))
