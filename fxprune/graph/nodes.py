"""Small questions about a torch.fx graph that passes, calibration and diffs all ask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxprune.errors import GraphError


def module_of(node: Node) -> nn.Module | None:
    """The module behind a call_module node, else None."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


def call_quietly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module as `module(...)` does, hooks included; whatever it raises reaches the caller and nobody else.

    A GraphModule called directly would also print its source and a traceback to stderr, which says nothing to a user
    who wrote neither.
    """
    if isinstance(module, GraphModule):
        return nn.Module.__call__(module, *args, **kwargs)
    return module(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module may do something beside its class's forward: hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def has_global_hooks() -> bool:
    """Whether there are hooks on the forward of every module (torch.nn.modules.module.register_module_forward_hook)."""
    module = nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def call_sites(graph_module: GraphModule) -> dict[nn.Module, list[Node]]:
    """Every called module with all the nodes that call it, under whatever name."""
    sites: dict[nn.Module, list[Node]] = {}
    for node in graph_module.graph.nodes:
        module = module_of(node)
        if module is not None:
            sites.setdefault(module, []).append(node)
    return sites


def input_of(node: Node) -> Node:
    """The single tensor input of a one-input module call, given by position or by keyword."""
    argument: Any = node.args[0] if node.args else node.kwargs.get("input", next(iter(node.kwargs.values()), None))
    if not isinstance(argument, Node):
        raise GraphError(f"node {node.name!r} is called with {argument!r} where a tensor was expected")
    return argument


_QUESTIONS = ("size", "dim", "shape", "ndim", "dtype", "device")  # Methods and attributes.


def without_input(graph: Graph, *, sizes_given: bool = False) -> set[Node]:
    """The nodes that no input of the graph leads to: what they give is the same for every batch.

    Args:
        graph: of a model.
        sizes_given: take sizes, type and device of the inputs for given, so that what depends on these alone is among them.
    """
    found: set[Node] = set()
    for node in graph.nodes:
        name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else ""
        asks = sizes_given and name in _QUESTIONS
        if node.op not in ("placeholder", "output") and (asks or found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def is_tied(graph_module: GraphModule, parameter: torch.Tensor) -> bool:
    """Whether a parameter is reachable under more than one name, or read by a get_attr node."""
    names = [name for name, p in graph_module.named_parameters(remove_duplicate=False) if p is parameter]
    reads = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    return len(names) > 1 or any(name in reads for name in names)
