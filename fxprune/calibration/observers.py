"""The observers between layers and their inputs, once InsertObservers has put them there."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxprune.graph import input_of, module_of
from fxprune.statistics import HessianObserver

OBSERVERS = "fxprune_observers"  # The module under which they stand.


def observer_of(layer: Node) -> HessianObserver:
    """The observer between a layer that is to be solved and its input."""
    observer = module_of(input_of(layer))
    assert isinstance(observer, HessianObserver)
    return observer


class observers_off:  # noqa: N801 - a context manager
    """Inside, the observers of a graph see nothing; what they were is put back afterwards."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.observers = [m for n in graph_module.graph.nodes if isinstance(m := module_of(n), HessianObserver)]

    def __enter__(self) -> None:
        self.enabled = [observer.enabled for observer in self.observers]
        for observer in self.observers:
            observer.enabled = False

    def __exit__(self, *error: object) -> None:
        for observer, enabled in zip(self.observers, self.enabled, strict=True):
            observer.enabled = enabled


def remove_observers(graph_module: GraphModule) -> bool:
    """Erase every observer's call and module, so that layers read their inputs directly; whether there were any."""
    observers = [n for n in graph_module.graph.nodes if isinstance(module_of(n), HessianObserver)]
    for node in observers:
        node.replace_all_uses_with(input_of(node))
        graph_module.graph.erase_node(node)
    if hasattr(graph_module, OBSERVERS):
        delattr(graph_module, OBSERVERS)
    return bool(observers)
