"""Small questions about a torch.fx graph that passes, calibration and diffs all ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxprune.errors import GraphError

Shape: TypeAlias = "Size | tuple[Any, ...] | None"  # Of a tensor, of a tuple or list, of all else.


def module_of(node: Node) -> nn.Module | None:
    """The module behind a call_module node, else None."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
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


def is_tied(graph_module: GraphModule, parameter: torch.Tensor) -> bool:
    """Whether a parameter is reachable under more than one name, or read by a get_attr node."""
    names = [name for name, p in graph_module.named_parameters(remove_duplicate=False) if p is parameter]
    reads = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    return len(names) > 1 or any(name in reads for name in names)


def arguments_of(node: Node, value_of: Callable[[Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a node is called with. Its lists and dicts are new ones each time: the function called may change them."""
    args = tuple(_own(argument, value_of) for argument in node.args)
    return args, {name: _own(argument, value_of) for name, argument in node.kwargs.items()}


def _own(argument: Any, value_of: Callable[[Node], Any]) -> Any:
    if isinstance(argument, Node):
        return value_of(argument)
    if isinstance(argument, (tuple, list)):
        items = [_own(item, value_of) for item in argument]
        if isinstance(argument, list):
            return items
        return type(argument)(*items) if hasattr(argument, "_fields") else tuple(items)
    if isinstance(argument, dict):
        return {key: _own(item, value_of) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_own(item, value_of) for item in (argument.start, argument.stop, argument.step)))
    return argument


class Runner(Interpreter):
    """Runs a graph node by node on one value for each placeholder: a tuple for `*args`, a dict for `**kwargs`.

    Unlike torch.fx's own Interpreter it gives a node lists and dicts that it may change, as generated code does, and
    leaves the message of an error as it is.

    Attributes:
        node: that has been run last, or is being run.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.node = next(iter(graph_module.graph.nodes))

    def run_node(self, n: Node) -> Any:
        """Run a node and remember it."""
        self.node = n
        return super().run_node(n)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The next value given."""
        if str(target).startswith("*"):
            return next(self.args_iter, {} if str(target).startswith("**") else ())
        return super().placeholder(target, args, kwargs)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, see `arguments_of`."""
        return arguments_of(n, self.env.__getitem__)


def value_shapes(graph_module: GraphModule, *inputs: Any) -> dict[Node, Shape]:
    """Run the graph once on example inputs, one for each placeholder; the shape of every node's value."""
    recorder = ShapeRecorder(graph_module)
    recorder.run(*inputs)
    return recorder.shapes


class ShapeRecorder(Runner):
    """Runs a graph, and keeps the shape of every node's value."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[Node, Shape] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node and note the shape of its value."""
        value = super().run_node(n)
        self.shapes[n] = _shape(value)
        return value


def _shape(value: Any) -> Shape:
    if isinstance(value, Tensor):
        return value.shape
    return tuple(map(_shape, value)) if isinstance(value, (tuple, list)) else None
