"""Which operations consume a layer's output first: skip connections and rectifiers. Graph analysis, no rewriting.

Where a layer's output goes straight into an add whose other operand has been computed already, the layer can absorb that
operand's error too: its target becomes y + (other_dense - other_pruned). Where the sum is rectified next, what lies
below the threshold need only stay there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxprune.annotations import annotation
from fxprune.operations import bounds_of, is_identity, summands


@dataclass(frozen=True)
class Consumers:
    """What consumes a layer's output first.

    Attributes:
        added: the other operands of the adds that it goes through, nodes or numbers.
        value: the last node that holds nothing but the sum of the layer's output and these.
    """

    added: tuple[Node | int | float, ...]
    value: Node

    @property
    def skips(self) -> tuple[Node, ...]:
        """The operands that the network computes: its skip connections."""
        return tuple(operand for operand in self.added if isinstance(operand, Node))

    @property
    def rectifier(self) -> tuple[float, float] | None:
        """Bounds outside of which the sum is all the same to the node that reads it, or None if there are none."""
        if len(self.value.users) != 1:
            return None
        user = next(iter(self.value.users))
        return None if annotation(user).changed else bounds_of(user)


def consumers(layer: Node) -> Consumers:
    """Follow a layer's output through adds whose other operand has been computed before the layer.

    The walk goes through adds (nested ones too) and through what is the identity in eval mode, and stops where the
    value has another user, where it meets anything else or a module that a hook changes, and at an operand that is
    computed after the layer, which will then be the one to absorb this layer's error.
    """
    position = {node: i for i, node in enumerate(layer.graph.nodes)}
    added: list[Node | int | float] = []
    value = layer
    while len(value.users) == 1:
        user = next(iter(value.users))
        if annotation(user).changed:
            break
        if not is_identity(user):
            other = _other_operand(user, value)
            if other is None or (isinstance(other, Node) and position[other] >= position[layer]):
                break
            added.append(other)
        value = user
    return Consumers(tuple(added), value)


def puts_out(layer: Node) -> bool:
    """Whether a layer's output, and nothing made of it, is all that the model puts out."""
    reached = consumers(layer)
    users = list(reached.value.users)
    return not reached.added and len(users) == 1 and users[0].op == "output" and users[0].args[0] is reached.value


def skip_operands(layer: Node) -> tuple[Node, ...]:
    """The other operands of the adds that a layer's output reaches first-hand, as far as they are computed before it."""
    return consumers(layer).skips


def _other_operand(node: Node, value: Node) -> Node | int | float | None:
    """The operand that an add puts beside `value`: a node, a number, or None if this is not a plain add."""
    operands = summands(node)
    if operands is None or operands[0] is operands[1]:
        return None  # x + x doubles the layer's own output.
    other = operands[1] if operands[0] is value else operands[0]
    return other if isinstance(other, (Node, int, float)) else None
