"""What the rules of the channel analysis read and write while a graph is walked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Size
from torch.fx import Node

from fxprune.channels.layout import Layout, Relations
from fxprune.graph import Shape
from fxprune.operations import describe

Value: TypeAlias = "Layout | tuple[Layout | None, ...] | None"


@dataclass
class Context:
    """The state of a walk.

    Attributes:
        shapes: of every node's value: a Size for a tensor, a tuple for a tuple or list, None for all else.
        relations: what has been found out about channel classes.
        values: layouts of the nodes walked so far.
    """

    shapes: Mapping[Node, Shape]
    relations: Relations = field(default_factory=Relations)
    values: dict[Node, Value] = field(default_factory=dict)

    def tensors(self, node: Node) -> list[Node]:
        """The inputs of a node that are, or hold, tensors."""
        return [source for source in node.all_input_nodes if holds_tensor(self.shapes.get(source))]

    def only_input(self, node: Node) -> tuple[Layout, Size] | str:
        """Layout and shape of the one tensor that a node reads, or why there is no such thing."""
        tensors = self.tensors(node)
        if len(tensors) != 1:
            return f"{describe(node)} reads {len(tensors)} tensors where one was expected"
        layout, shape = self.values[tensors[0]], self.shapes[tensors[0]]
        if not isinstance(layout, Layout) or not isinstance(shape, Size):
            return f"{describe(node)} reads a value without a channel dimension"
        return layout, shape

    def output_shape(self, node: Node) -> Size:
        """Shape of a node's value; empty if that is no tensor."""
        shape = self.shapes.get(node)
        return shape if isinstance(shape, Size) else Size()

    def kept(self, node: Node, layout: Layout) -> Layout | str:
        """The layout of the input as that of the output, if the shapes agree with it."""
        shape, d = self.output_shape(node), layout.dim
        if len(shape) <= d or shape[d] != len(layout.classes):
            return f"the output of {describe(node)} does not have the channels of its input"
        return layout

    def fixed(self, shape: Shape, reason: str) -> Value:
        """Channels that stay in place, for a value that is not understood."""
        if isinstance(shape, Size):
            if len(shape) < 2:
                return None
            layout = Layout(1, self.relations.new(shape[1]))
            self.relations.fix(layout.classes, reason)
            return layout
        if shape is None or not holds_tensor(shape):
            return None
        inner: list[Any] = list(shape)
        items = [self.fixed(item, reason) for item in inner]
        return tuple(item if isinstance(item, Layout) else None for item in items)

    def fix(self, value: Value, reason: str) -> None:
        """The channels of a value stay in place."""
        for layout in value if isinstance(value, tuple) else (value,):
            if layout is not None:
                self.relations.fix(layout.classes, reason)


def holds_tensor(shape: Shape) -> bool:
    """Whether a value of this shape is a tensor, or a tuple that holds one."""
    return isinstance(shape, Size) or (shape is not None and any(map(holds_tensor, shape)))
