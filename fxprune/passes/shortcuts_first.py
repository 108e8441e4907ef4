"""ShortcutsFirst: computes what is added to a layer's output before the layer, where no layer has to run for it.

A layer can make up for the error that a shortcut brings, if the shortcut's value is known when the layer is solved. Models
often write the shortcut down last: a slice, a pooling or padding of the block's input, which could as well come first. A
shortcut with a layer of its own stays behind: that layer is then the one that makes up for the other's error.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.geometry import is_matrix_layer
from fxprune.graph import module_of
from fxprune.operations import is_identity, operation_of, summands
from fxprune.passes.base import Pass

PURE = frozenset({"elementwise", "binary", "spatial", "reshape", "reduce", "concatenate", "split", "item", "pad"})


class ShortcutsFirst(Pass):
    """Moves the nodes between a block's input and the add at its end in front of the block's last layer.

    Only nodes without parameters, hooks and random numbers move, and only if none of them depends on the layer.
    """

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        modified = False
        for layer in list(graph_module.graph.nodes):
            if not is_matrix_layer(module_of(layer)):
                continue
            position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
            for operand in _added(layer):
                later = _computed_after(operand, position, position[layer])
                if later and all(map(_moves, later)):
                    for node in later:
                        layer.prepend(node)
                    self.record(
                        graph_module, "moved", operand, into=layer.name, reason="computed before what it is added to"
                    )
                    modified = True
        return PassResult(graph_module, modified)


def _added(layer: Node) -> list[Node]:
    """What adds put beside a layer's output, as long as nothing else reads the sum."""
    found: list[Node] = []
    value = layer
    while len(value.users) == 1:
        user = next(iter(value.users))
        operands = summands(user)
        if operands is not None and operands[0] is not operands[1]:
            other = operands[1] if operands[0] is value else operands[0]
            if isinstance(other, Node):
                found.append(other)
        elif not is_identity(user):
            break
        value = user
    return found


def _computed_after(operand: Node, position: dict[Node, int], at: int) -> list[Node]:
    """The nodes after a position that an operand depends on, itself included, in graph order."""
    found: set[Node] = set()
    pending = [operand]
    while pending:
        node = pending.pop()
        if position[node] >= at and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return sorted(found, key=position.__getitem__)


def _moves(node: Node) -> bool:
    """Whether a node computes the same wherever it stands."""
    operation, module = operation_of(node), module_of(node)
    if operation is None or (module is not None and (list(module.parameters()) or module._forward_hooks)):
        return False
    if operation.training is not None and not is_identity(node):
        return False  # Dropout that is at work draws random numbers.
    return operation.is_metadata or operation.channels in PURE
