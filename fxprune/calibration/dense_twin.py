"""The dense model beside one that has fewer channels: which node is which, and which of its channels are left.

Where a pass has removed channels, the dense and the pruned model cannot run on the same modules. The dense one is then a copy
of the graph from before that, and what is compared with the pruned model's values are those of its channels that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.graph import arguments_of


@dataclass(frozen=True)
class Kept:
    """Which channels of a value are left: channel i is what was channel `places[i]`.

    Attributes:
        dim: the channel dimension, counted from the front.
        places: (c,) int64.
    """

    dim: int
    places: Tensor

    def of(self, value: Tensor) -> Tensor:
        """These channels of the value that has them all."""
        return value.index_select(self.dim, self.places.to(value.device))

    def after(self, places: Any) -> Kept:
        """What is left once channel i is what is now channel `places[i]`."""
        return Kept(self.dim, self.places[torch.as_tensor(places)])


@dataclass
class DenseTwin:
    """A copy of a graph from before its layers were solved.

    Attributes:
        graph_module: the copy.
        kept: by name of the node, which of its channels the other graph still has; a name that is missing has them all.
    """

    graph_module: GraphModule
    kept: dict[str, Kept] = field(default_factory=dict)

    def moved(self, kept: dict[str, Kept]) -> None:
        """Note a removal or another order of channels in the other graph, by the places that it had until then."""
        for name, now in kept.items():
            before = self.kept.get(name)
            self.kept[name] = now if before is None else before.after(now.places)

    def wanted(self, name: str, value: Any) -> Any:
        """The dense value of the node of that name, of those channels that the other graph has there."""
        kept = self.kept.get(name)
        return kept.of(value) if kept is not None and isinstance(value, Tensor) else value

    def calls(self, nodes: Iterable[Node]) -> dict[Node, TwinCall]:
        """For nodes of the other graph, in order, what runs in their place in this one; not for those put in later."""
        own = {node.name: node for node in self.graph_module.graph.nodes}
        found = {}
        for node in nodes:
            twin = own.get(node.name)
            if twin is not None and len(twin.all_input_nodes) == len(node.all_input_nodes):
                found[node] = TwinCall(twin, dict(zip(twin.all_input_nodes, node.all_input_nodes, strict=True)))
        return found


@dataclass(frozen=True)
class TwinCall:
    """A node of the dense graph, and the nodes of the other graph that stand for its inputs."""

    node: Node
    inputs: dict[Node, Node]

    def arguments(self, value_of: Callable[[Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it is called with, given the dense values of the other graph's nodes."""
        return arguments_of(self.node, lambda source: value_of(self.inputs[source]))
