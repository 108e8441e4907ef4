"""The shapes of a graph's values on a few images: found in one run, and true for as long as what they come from is the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxprune.calibration.batches import count, map_tensors, take
from fxprune.calibration.failures import run_graph
from fxprune.errors import CalibrationError
from fxprune.graph import Shape, ShapeRecorder, input_of, module_of
from fxprune.runtime.precision import full_precision
from fxprune.runtime.surroundings import same_random_numbers
from fxprune.statistics import HessianObserver

FEW_IMAGES = 4
_Signature: TypeAlias = tuple[Any, ...]
_WITHOUT_SHAPE = re.compile(r"(, )?\b(inplace|bias)=(True|False)")


@dataclass(frozen=True)
class Example:
    """Some images, and the shapes of what a graph makes of them.

    Attributes:
        inputs: values of the graph's placeholders: of the first FEW_IMAGES images of a batch, or of all.
        takes_few: whether the graph takes fewer images than a batch holds; if not, the inputs are a whole batch.
        shapes: of every node's value.
    """

    inputs: list[Any]
    takes_few: bool
    shapes: Mapping[Node, Shape]

    @property
    def images(self) -> int:
        """How many images there are."""
        return count(self.inputs)


@dataclass
class KnownShapes:
    """What one run has shown of a graph, its copies and what passes make of it.

    A node's shape is kept with all that it depends on: the operation, its settings, the sizes of its weights, and the shapes of
    its inputs. It holds in any graph in which a node of the same name has the same. So folding, permuting, pruning and
    observing need no other run, and what a pass replaces by something else does.
    """

    inputs: list[Any] | None = None
    takes_few: bool = True
    known: dict[str, tuple[_Signature, Shape]] = field(default_factory=dict)

    def example(self, graph_module: GraphModule) -> Example | None:
        """The example with the shapes in this graph, or None if the graph has to run for them."""
        if self.inputs is None:
            return None
        shapes: dict[Node, Shape] = {}
        for node in graph_module.graph.nodes:
            if isinstance(module_of(node), HessianObserver):
                shapes[node] = shapes[input_of(node)]
                continue
            signature, shape = self.known.get(node.name, ((), None))
            if signature != _signature(node, shapes):
                return None
            shapes[node] = shape
        return Example(self.inputs, self.takes_few, shapes)

    def run(self, graph_module: GraphModule, batch: Sequence[Any]) -> tuple[Example, Any]:
        """Run a graph on a few images of a batch, or on all where it takes no other number; its output too.

        Args:
            graph_module: a graph; its observers add what they see.
            batch: values of its placeholders.

        Raises:
            CalibrationError: if it does not run on the whole batch either.
        """
        if self.takes_few:
            try:
                return self._run(graph_module, take(list(batch), slice(FEW_IMAGES)), takes_few=True)
            except CalibrationError:
                pass  # It may take batches of one size only; if not, the run on the whole one says what is wrong.
        return self._run(graph_module, list(batch), takes_few=False)

    def _run(self, graph_module: GraphModule, inputs: list[Any], *, takes_few: bool) -> tuple[Example, Any]:
        recorder = ShapeRecorder(graph_module)
        with torch.no_grad(), full_precision(), same_random_numbers():
            output = run_graph(
                recorder, map_tensors(inputs, torch.clone), "calibration batch 0"
            )  # A hook may write into them.
        self.inputs, self.takes_few = inputs, takes_few
        self.known = {n.name: (_signature(n, recorder.shapes), shape) for n, shape in recorder.shapes.items()}
        return Example(inputs, takes_few, recorder.shapes), output


def _signature(node: Node, shapes: Mapping[Node, Shape]) -> _Signature:
    """All that a value's shape depends on, except for numbers, which themselves depend on shapes."""
    module, what = module_of(node), node.target
    if module is not None:
        what = tuple(map(_of_module, module.modules()))  # type: ignore[assignment]
    elif node.op == "get_attr":
        value = attrgetter(str(node.target))(node.graph.owning_module)
        chosen = int(value.sum()) if getattr(value, "dtype", None) == torch.bool else 0  # As a mask it chooses so many.
        what = (getattr(value, "shape", None), chosen)  # type: ignore[assignment]
    arguments = torch.fx.map_arg((node.args, node.kwargs), lambda source: shapes[source])
    return (node.op, what, repr(arguments))


def _of_module(module: nn.Module) -> _Signature:
    tensors = (*module._parameters.values(), *module._buffers.values())
    sizes = tuple(tensor.shape for tensor in tensors if tensor is not None and tensor.dim() > 1)
    return (type(module), _WITHOUT_SHAPE.sub("", module.extra_repr()), sizes)
