"""Which values of a graph may share memory: graph analysis for RemoveInplace, no rewriting of operations.

A node that gives a view of its input, or may give one, is a child of that input; the nodes thus form trees.
What writes into one node's value may change the values of all others in its tree.
"""

from __future__ import annotations

import operator

from torch import nn
from torch.fx import GraphModule, Node

from fxprune.consumers import is_identity
from fxprune.errors import GraphError
from fxprune.graph import module_of

REMEDY = "Rewrite this line without the side effect, or keep the module that holds it as a leaf (exclude)."
# Tensor methods and torch functions that give a tuple of views of their first input.
SPLITS = frozenset("chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind".split())
# Those that give, or may give, a view of it.
_VIEWS = SPLITS | frozenset(
    "getitem view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze transpose t permute "
    "swapaxes swapdims movedim moveaxis adjoint expand expand_as broadcast_to broadcast_tensors narrow "
    "select diagonal as_strided contiguous detach to type type_as float double half bfloat16 cpu cuda real "
    "imag conj positive".split()
)
_VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_METADATA = frozenset("size dim ndimension numel nelement stride element_size __len__".split())


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
        self._same[node] = node if parent is None or not _is_same_tensor(node) else self._same[parent]

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


def called_name(node: Node) -> str:
    """The name of the method or function that a node calls; "" for other nodes and for nameless functions."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def is_number(node: Node) -> bool:
    """Whether a node's value is a Python number, or a tuple of numbers such as a shape."""
    if _is_metadata(node) or (node.op == "call_method" and node.target in ("item", "tolist")):
        return True
    is_arithmetic = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    return is_arithmetic and all(map(is_number, node.all_input_nodes))


def _viewed(node: Node) -> Node | None:
    """The node whose memory a node's value may share, or None if its value is new."""
    is_view = (
        called_name(node) in _VIEWS
        or (node.op == "call_method" and node.target == "unfold")  # The function F.unfold copies.
        or (node.target is getattr and node.args[1] in _VIEW_ATTRIBUTES)
        or isinstance(module_of(node), (nn.Flatten, nn.Unflatten))
        or _is_same_tensor(node)
    )
    return node.all_input_nodes[0] if is_view and node.all_input_nodes else None


def _is_same_tensor(node: Node) -> bool:
    """Whether a node returns its input itself."""
    # `contiguous` returns either its input or a copy.
    return isinstance(module_of(node), nn.Identity) or (is_identity(node) and node.target != "contiguous")


def _are_apart(path: tuple[Node, ...], other: tuple[Node, ...]) -> bool:
    """Whether two views part at different items of one value, such as two chunks of a tensor."""
    for a, b in zip(path, other, strict=False):
        if a is not b:
            i, j = (n.args[1] if n.target is operator.getitem else None for n in (a, b))
            return type(i) is int and type(j) is int and i != j and (i < 0) == (j < 0)
    return False


def _is_metadata(node: Node) -> bool:
    """Whether a node reads a tensor's shape, dtype or device, and none of its values."""
    if node.target is getattr:
        return node.args[1] not in _VIEW_ATTRIBUTES
    return node.op == "call_method" and node.target in _METADATA
