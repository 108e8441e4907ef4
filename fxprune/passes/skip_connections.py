"""Which skip connections a layer can make up for: graph analysis, no rewriting.

Where a layer's output goes straight into an add whose other operand has been computed already, the layer can absorb that
operand's error too: its wanted output becomes y + (other_dense - other_pruned).
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxprune.graph import module_of

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)


def skip_operands(layer: Node) -> tuple[Node, ...]:
    """The other operands of the adds that a layer's output reaches first-hand, as far as they are computed before it.

    The walk goes through adds (nested ones too) and through what is the identity in eval mode, and stops where the
    value has another user, where it meets anything else, and at an operand that is computed after the layer, which
    will then be the one to absorb this layer's error.
    """
    position = {node: i for i, node in enumerate(layer.graph.nodes)}
    operands: list[Node] = []
    value = layer
    while len(value.users) == 1:
        user = next(iter(value.users))
        if not is_identity(user):
            other = _other_operand(user, value)
            if isinstance(other, Node):
                if position[other] >= position[layer]:
                    break
                operands.append(other)
            elif other is None:
                break
        value = user
    return tuple(operands)


def is_identity(node: Node) -> bool:
    """Whether a node returns its input unchanged in eval mode."""
    module = module_of(node)
    if module is not None:
        return isinstance(module, (nn.Identity, *_DROPOUTS)) and not module.training
    if node.op == "call_method":
        return node.target in ("contiguous", "detach")
    if node.op != "call_function":
        return False
    if node.target in _DROPOUT_FUNCTIONS or getattr(node.target, "__name__", "") == "stochastic_depth":
        return _argument(node, "training", position=3 if node.target not in _DROPOUT_FUNCTIONS else 2) is False
    return False


def _argument(node: Node, name: str, position: int) -> object:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else None


def _other_operand(node: Node, value: Node) -> Node | int | float | None:
    """The operand that an add puts beside `value`: a node, a number, or None if this is not a plain add."""
    is_add = (node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)) or (
        node.op == "call_method" and node.target in ("add", "__add__")
    )
    operands = [*node.args, *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs)]
    if not is_add or len(operands) != 2 or "alpha" in node.kwargs or "out" in node.kwargs:
        return None
    if operands[0] is operands[1]:
        return None  # x + x doubles the layer's own output.
    other = operands[1] if operands[0] is value else operands[0]
    return other if isinstance(other, (Node, int, float)) else None
