"""ONNX files take tensors; a graph that takes a list or a dict of them is written with an input for each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

from fxprune.calibration.batches import ModelInput, graph_inputs, inputs_by_name
from fxprune.errors import ExportError


def with_tensor_inputs(graph_module: GraphModule, example_inputs: Any) -> tuple[GraphModule, Any]:
    """A graph whose inputs are tensors, and an example for it; both as they are where that is so already.

    An input that is a list becomes `name_0`, `name_1`, ...; one that is a mapping `name_key` for each of its keys.

    Args:
        graph_module: not modified.
        example_inputs: in any form that a batch may have.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    taken_apart = [
        (n, x) for n, x in zip(placeholders, graph_inputs(placeholders), strict=True) if x.keys and not x.stars
    ]
    if not taken_apart:
        return graph_module, example_inputs
    given = inputs_by_name(example_inputs, graph_inputs(placeholders), "example_inputs", error=ExportError)
    lists = [(node, x) for node, x in taken_apart if isinstance(given.get(x.name), (list, tuple, Mapping))]
    if not lists:
        return graph_module, example_inputs
    changed = copy.copy(graph_module)
    changed.graph = copy.deepcopy(graph_module.graph)
    nodes = {node.name: node for node in changed.graph.nodes}
    for node, x in lists:
        found = _take_apart(nodes[node.name], x, given.pop(x.name))
        given |= found
    changed.recompile()
    return changed, given


def _take_apart(node: Node, of: ModelInput, value: Any) -> dict[str, Any]:
    """Put a placeholder for each of its items in the place of one; the items by the names of these."""
    graph, found = node.graph, dict[str, Any]()
    for user in list(node.users):
        key: Any = user.args[1]
        name = f"{of.name}_{key}"
        item = value.get(key) if isinstance(value, Mapping) else value[key]
        if name not in found:
            with graph.inserting_before(node):
                graph.placeholder(name)
        found[name] = item
        user.replace_all_uses_with(next(n for n in graph.find_nodes(op="placeholder") if n.target == name))
        graph.erase_node(user)
    graph.erase_node(node)
    return found
