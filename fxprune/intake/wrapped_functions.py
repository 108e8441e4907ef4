"""Functions under torch.fx.wrap that read a layer's weight: traced through where that leads to something."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx._symbolic_trace import _wrapped_fns_to_patch

from fxprune.errors import FxPruneError


def without_weights(graph_module: GraphModule, again: Callable[[], GraphModule]) -> GraphModule:
    """The graph, or one in which such functions are written out.

    Args:
        graph_module: a traced model.
        again: traces the model again.
    """
    functions = {node.target for node in graph_module.graph.nodes if _reads_weight(node)}
    if not functions:
        return graph_module
    with _unwrapped(functions):
        try:
            found = again()
        except FxPruneError:
            return graph_module
    # Item assignments could not be made free of side effects afterwards.
    writes = any(n.target in (operator.setitem, "__setitem__") for n in found.graph.nodes)
    return graph_module if writes else found


def _reads_weight(node: Node) -> bool:
    if node.op != "call_function" or not _is_wrapped(node.target):
        return False
    root = node.graph.owning_module
    values = [attrgetter(str(n.target))(root) for n in node.all_input_nodes if n.op == "get_attr"]
    return any(isinstance(value, Tensor) and value.dim() >= 2 for value in values)


def _is_wrapped(function: Any) -> bool:
    return any(space.get(name) is function for (_, name), space in _wrapped_fns_to_patch.items())


@contextmanager
def _unwrapped(functions: set[Any]) -> Iterator[None]:
    taken = {key: space for key, space in _wrapped_fns_to_patch.items() if space.get(key[1]) in functions}
    for key in taken:
        del _wrapped_fns_to_patch[key]
    try:
        yield
    finally:
        _wrapped_fns_to_patch.update(taken)
