"""Which observer a layer reads through, once InsertObservers has run."""

from __future__ import annotations

from torch.fx import Node

from fxprune.graph import input_of, module_of
from fxprune.statistics import HessianObserver


def observer_of(layer: Node) -> HessianObserver:
    """The observer between a layer that is to be solved and its input."""
    observer = module_of(input_of(layer))
    assert isinstance(observer, HessianObserver)
    return observer
