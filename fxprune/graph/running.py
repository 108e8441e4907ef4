"""Runs a torch.fx graph node by node: its values, and their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Size, Tensor
from torch.fx import GraphModule, Interpreter, Node

Shape: TypeAlias = "Size | tuple[Any, ...] | None"  # Of a tensor, of a tuple or list, of all else.


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
