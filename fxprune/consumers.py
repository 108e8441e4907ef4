"""Which operations consume a layer's output first: skip connections and rectifiers. Graph analysis, no rewriting.

Where a layer's output goes straight into an add whose other operand has been computed already, the layer can absorb that
operand's error too: its target becomes y + (other_dense - other_pruned). Where the sum is rectified next, what lies
below the threshold need only stay there.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

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


_BOUNDS: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"), (0.0, math.inf)),
    F.relu6: (0.0, 6.0),
    **dict.fromkeys((nn.Hardswish, F.hardswish), (-3.0, math.inf)),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), (-3.0, 3.0)),
}


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
        return _clamp_bounds(next(iter(self.value.users))) if len(self.value.users) == 1 else None


def consumers(layer: Node) -> Consumers:
    """Follow a layer's output through adds whose other operand has been computed before the layer.

    The walk goes through adds (nested ones too) and through what is the identity in eval mode, and stops where the
    value has another user, where it meets anything else, and at an operand that is computed after the layer, which
    will then be the one to absorb this layer's error.
    """
    position = {node: i for i, node in enumerate(layer.graph.nodes)}
    added: list[Node | int | float] = []
    value = layer
    while len(value.users) == 1:
        user = next(iter(value.users))
        if not is_identity(user):
            other = _other_operand(user, value)
            if other is None or (isinstance(other, Node) and position[other] >= position[layer]):
                break
            added.append(other)
        value = user
    return Consumers(tuple(added), value)


def skip_operands(layer: Node) -> tuple[Node, ...]:
    """The other operands of the adds that a layer's output reaches first-hand, as far as they are computed before it."""
    return consumers(layer).skips


def _clamp_bounds(node: Node) -> tuple[float, float] | None:
    """The bounds outside of which a node's output stays the same: ReLU, ReLU6, Hardtanh, Hardswish, Hardsigmoid."""
    module = module_of(node)
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one.
        return module.min_val, module.max_val
    if module is not None:
        return _BOUNDS.get(type(module))
    if node.target is F.hardtanh:
        minimum, maximum = _argument(node, "min_val", 1), _argument(node, "max_val", 2)
        return (-1.0 if minimum is None else minimum), (1.0 if maximum is None else maximum)
    return _BOUNDS.get(node.target) if node.op in ("call_function", "call_method") else None


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


def _argument(node: Node, name: str, position: int) -> Any:
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
