"""Runs a graph once on example inputs to learn the sizes of its values; writes nothing into the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxprune.errors import GraphError
from fxprune.export.batches import example_tensors
from fxprune.export.parity import evaluating


class _Shapes(Interpreter):
    """Runs a graph and keeps the size of every value; unlike ShapeProp it writes nothing into the graph."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        first = next(_tensors(value), None)
        if first is not None:
            self.shapes[n] = tuple(first.shape)
        return value


def output_shapes(graph_module: GraphModule, example_inputs: Any) -> dict[Node, tuple[int, ...]]:
    """Sizes of every node's (first) tensor, from one run in eval mode; training flags are put back.

    Raises:
        ExportError: example_inputs does not fit the model's inputs.
        GraphError: the graph cannot run on them.
    """
    inputs = example_tensors(example_inputs, graph_module)
    first = next((p for p in graph_module.parameters() if p.is_floating_point()), None)
    if first is not None:
        inputs = tuple(x.to(first.device, first.dtype if x.is_floating_point() else x.dtype) for x in inputs)
    interpreter = _Shapes(graph_module)
    try:
        with evaluating(graph_module):
            interpreter.run(*inputs)
    except Exception as error:
        sizes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise GraphError(
            f"{graph_module._get_name()} cannot run on example_inputs of shape {sizes}: "
            f"{str(error).splitlines()[0]}. Give inputs of the size that the model takes, or none"
        ) from error
    return interpreter.shapes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
