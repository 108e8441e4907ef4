"""How long the values of a graph's nodes live, and what may be done with their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.graph import has_global_hooks, has_hooks, module_of
from fxprune.operations import operation_of, summands, writes_in_place


def last_uses(nodes: list[Node]) -> dict[Node, list[Node]]:
    """For each node, the nodes whose values it is the last to read."""
    dying: dict[Node, list[Node]] = {node: [] for node in nodes}
    seen: set[Node] = set()
    for node in reversed(nodes):
        for source in [node, *node.all_input_nodes]:
            if source not in seen:
                seen.add(source)
                dying[node].append(source)
    return dying


def spare_input(node: Node) -> Node | None:
    """The input of a ReLU or an add whose memory the output may overwrite; None if there is none.

    That is an input which a layer or an add has just made, and which nothing else reads. Writing to memory that has been
    touched before takes half the time of writing to new memory.
    """
    module = module_of(node)
    if _is_hooked(module):
        return None
    operation, operands = operation_of(node), summands(node)
    relu = operation is not None and operation.name == "relu" and len(node.all_input_nodes) == 1
    if not relu and (operands is None or len(node.all_input_nodes) != 2):
        return None
    return next((source for source in node.all_input_nodes if len(source.users) == 1 and _is_fresh(source)), None)


def _is_fresh(source: Node) -> bool:
    """Whether a value is in memory of its own."""
    operation = operation_of(source)
    if summands(source) is not None:
        return not writes_in_place(source)
    module = module_of(source)  # A hook may give something else, or keep the value.
    return module is not None and operation is not None and operation.channels == "matrix" and not _is_hooked(module)


def _is_hooked(module: nn.Module | None) -> bool:
    return module is not None and (has_hooks(module) or has_global_hooks())


def overwrite(node: Node, source: Node, value_of: Callable[[Node], Any]) -> Tensor | None:
    """The node's value in the memory of an input (`spare_input`); None if it does not fit there."""
    x = value_of(source)
    if summands(node) is None:
        return torch.relu_(x)
    other = value_of(next(of for of in node.all_input_nodes if of is not source))
    fits = isinstance(x, Tensor) and isinstance(other, Tensor) and (x.shape, x.dtype) == (other.shape, other.dtype)
    return x.add_(other) if fits else None
