"""Which values of a graph may share memory: graph analysis for RemoveInplace, no rewriting of operations.

A node that gives a view of its input, or may give one, is a child of that input; the nodes thus form trees.
What writes into one node's value may change the values of all others in its tree.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from fxprune.errors import GraphError
from fxprune.operations import memory_of, operation_of

REMEDY = "Rewrite this line without the side effect, or keep the module that holds it as a leaf (exclude)."


class SharedMemory:
    """The trees of nodes that may share memory, grown node by node as side effects are removed."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self._path: dict[Node, tuple[Node, ...]] = {}  # From the root to the node itself.
        self._tree: dict[Node, list[Node]] = {}  # All nodes under a root.
        self._same: dict[Node, Node] = {}  # The first node that is the very same tensor.

    def add(self, node: Node) -> None:
        """Enter the next node of the graph, in its out-of-place form."""
        parent = _viewed(node)
        self._path[node] = (node,) if parent is None else (*self._path[parent], node)
        self._tree.setdefault(self._path[node][0], []).append(node)
        self._same[node] = node if parent is None or memory_of(node) != "same" else self._same[parent]

    def redirect_later_reads(self, overwritten: Node, result: Node) -> list[str]:
        """Let all that reads `overwritten` after `result` read `result`, and give the names of those nodes.

        Raises:
            GraphError: if the memory is a parameter's or buffer's, or is read later through another view.
        """
        path = self._path[overwritten]
        if path[0].op == "get_attr" and "_tensor_constant" not in str(path[0].target):
            raise GraphError(
                f"node {result.name!r} writes into {path[0].target!r}, which the model keeps from "
                f"call to call. {REMEDY}"
            )
        readers: dict[str, None] = {}
        for other in self._tree[path[0]]:
            later = [user for user in other.users if self._position[user] > self._position[result]]
            for reader in later:
                if self._same[other] is self._same[overwritten]:
                    reader.replace_input_with(other, result)
                    readers[reader.name] = None
                    continue
                read = (*self._path[other], reader) if _viewed(reader) is other else self._path[other]
                if not _is_metadata(reader) and not _are_apart(path, read):
                    raise GraphError(
                        f"node {result.name!r} overwrites {overwritten.name!r} in place, and node "
                        f"{reader.name!r} later reads {other.name!r}, which may share its memory. {REMEDY}"
                    )
        return list(readers)


def is_number(node: Node) -> bool:
    """Whether a node's value is a Python number, or a tuple of numbers such as a shape."""
    if _is_metadata(node) or (node.op == "call_method" and node.target in ("item", "tolist")):
        return True
    is_arithmetic = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    return is_arithmetic and all(map(is_number, node.all_input_nodes))


def _viewed(node: Node) -> Node | None:
    """The node whose memory a node's value may share, or None if its value is new."""
    return node.all_input_nodes[0] if memory_of(node) != "new" and node.all_input_nodes else None


def _are_apart(path: tuple[Node, ...], other: tuple[Node, ...]) -> bool:
    """Whether two views part at different items of one value, such as two chunks of a tensor."""
    for a, b in zip(path, other, strict=False):
        if a is not b:
            i, j = (n.args[1] if n.target is operator.getitem else None for n in (a, b))
            return type(i) is int and type(j) is int and i != j and (i < 0) == (j < 0)
    return False


def _is_metadata(node: Node) -> bool:
    """Whether a node reads a tensor's shape, dtype or device, and none of its values."""
    operation = operation_of(node)
    return operation is not None and operation.is_metadata
