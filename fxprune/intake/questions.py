"""What forward asks about a parameter without reading its numbers: `x.to(self.conv.weight.dtype)`, `self.weight.shape[0]`.

A layer whose parameter is read beside its own call is not compressed, as something else may rely on it. Such questions rely on
nothing, so they are asked of something else: sizes are numbers, and type and device those of an empty buffer beside.
"""

from __future__ import annotations

import operator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

_PLACE = ("dtype", "device")
_SIZES = ("shape", "ndim")
_METHODS = ("size", "dim", "numel", "nelement", "ndimension")


def redirect(graph_module: GraphModule) -> bool:
    """Take the questions about parameters off them; whether there were any."""
    changed = False
    for node in list(graph_module.graph.find_nodes(op="get_attr")):
        parameter = attrgetter(str(node.target))(graph_module)
        if not isinstance(parameter, nn.Parameter):
            continue
        for user in list(node.users):
            changed |= _answered(graph_module, node, user, parameter)
        if not node.users:
            graph_module.graph.erase_node(node)
    return changed


def _answered(graph_module: GraphModule, node: Node, user: Node, parameter: nn.Parameter) -> bool:
    """Answer one question, if it is one."""
    if user.target is getattr and user.args[0] is node and user.args[1] in _PLACE:
        name = f"_like_{str(parameter.dtype).removeprefix('torch.')}"
        if not hasattr(graph_module, name):
            graph_module.register_buffer(
                name, torch.empty(0, dtype=parameter.dtype, device=parameter.device), persistent=False
            )
        with graph_module.graph.inserting_before(node):
            user.replace_input_with(node, graph_module.graph.get_attr(name))
        return True
    if user.target is getattr and user.args[0] is node and user.args[1] in _SIZES:
        _put(user, tuple(parameter.shape) if user.args[1] == "shape" else parameter.ndim)
        return True
    if user.op == "call_method" and user.target in _METHODS and not user.kwargs:
        rest: tuple[Any, ...] = user.args[1:]
        if all(isinstance(argument, int) for argument in rest):
            value = getattr(parameter, str(user.target))(*rest)
            _put(user, tuple(value) if isinstance(value, torch.Size) else value)
            return True
    return False


def _put(question: Node, answer: Any) -> None:
    """Put a number, or a tuple of numbers, in the place of a node."""
    for user in list(question.users):
        if user.target is operator.getitem and isinstance(answer, tuple) and isinstance(user.args[1], int):
            _put(user, answer[user.args[1]])
    for user in list(question.users):
        user.args, user.kwargs = (_replaced(given, question, answer) for given in (user.args, user.kwargs))
    question.graph.erase_node(question)


def _replaced(given: Any, question: Node, answer: Any) -> Any:
    return map_arg(given, lambda node: answer if node is question else node)
