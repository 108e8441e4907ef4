"""Which values of a graph never change in eval mode, and what they are: those computed of parameters and buffers alone."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxprune.graph import module_of
from fxprune.operations import called_name, writes_in_place

_RANDOM = (
    "rand", "normal", "bernoulli", "multinomial", "poisson", "uniform", "exponential", "cauchy", "geometric", "empty",
)  # fmt: skip


class Constants:
    """Tells the constant nodes of a graph, and computes them.

    Args:
        graph_module: the graph, in eval mode.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self._known: dict[Node, bool] = {}
        self._values: dict[Node, Any] = {}

    def holds(self, node: Any) -> bool:
        """Whether a node's value is the same at every call."""
        if not isinstance(node, Node):
            return False
        if node not in self._known:
            self._known[node] = self._is_constant(node)
        return self._known[node]

    def _is_constant(self, node: Node) -> bool:
        if node.op == "get_attr":
            same = self.graph_module.graph.find_nodes(op="get_attr")
            if any(_is_written_to(n) for n in same if n.target == node.target):
                return False
            return isinstance(attrgetter(str(node.target))(self.graph_module), Tensor)
        if node.op in ("placeholder", "output") or not node.all_input_nodes or not _is_pure(node):
            return False
        return all(map(self.holds, node.all_input_nodes))

    @torch.no_grad()
    def value(self, node: Node) -> Any:
        """What a constant node computes; parameters as they are."""
        if node not in self._values:
            args: Any = map_arg(node.args, self.value)
            kwargs: Any = map_arg(node.kwargs, self.value)
            target: Any = node.target
            if node.op == "get_attr":
                found = attrgetter(target)(self.graph_module)
            elif node.op == "call_module":
                found = self.graph_module.get_submodule(target)(*args, **kwargs)
            elif node.op == "call_method":
                found = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                found = target(*args, **kwargs)
            self._values[node] = found
        return self._values[node]

    def sources(self, node: Node) -> list[str]:
        """The names of the parameters and buffers that a constant is computed of, in the order of the graph."""
        if node.op == "get_attr":
            return [str(node.target)]
        return list(dict.fromkeys(name for source in node.all_input_nodes for name in self.sources(source)))

    def forget(self, node: Node) -> None:
        """Take a constant out of the graph, with all it is computed of, unless somebody else reads them."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node in self._known and self._known[node] and not node.users:
                waiting += node.all_input_nodes
                del self._known[node]
                node.graph.erase_node(node)


def _is_pure(node: Node) -> bool:
    """Whether a node gives the same result for the same inputs, and changes none of them."""
    module = module_of(node)
    if module is not None:
        return not module.training and not isinstance(module, nn.RNNBase)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if any(name.startswith(prefix) for prefix in _RANDOM) or _writes(node):
        return False
    if "dropout" in name:
        return node.kwargs.get("training") is False
    if node.target in (F.batch_norm, torch.batch_norm):
        return node.kwargs.get("running_mean", (*node.args, None, None)[1]) is None
    return True


def _writes(node: Node) -> bool:
    assigns = called_name(node) in ("setitem", "__setitem__")
    return assigns or node.kwargs.get("out") is not None or writes_in_place(node)


def _is_written_to(value: Node) -> bool:
    return any(_writes(user) and user.args and user.args[0] is value for user in value.users)
