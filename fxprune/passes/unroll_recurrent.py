"""UnrollRecurrent and RollUpRecurrent: recurrent layers as plain products while their matrices are solved, and back.

`fxprune.layers.recurrent` says what such a layer becomes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Size
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import annotate, annotation
from fxprune.calibration.calibration import Calibration
from fxprune.graph import input_of, module_of
from fxprune.layers.recurrent import Collect, Outputs, Recurrent, Scan, States, Unprojected
from fxprune.passes.base import CalibratedPass, Pass
from fxprune.tracing import matches

UNROLLED = "unrolled_recurrent"  # The module under which the helpers stand.
PACKED = "reads packed sequences, whose steps have other numbers of samples each"


class UnrollRecurrent(CalibratedPass):
    """Writes every recurrent layer out as linear layers on all time steps and the recurrence between them.

    1. Matrices are called as `lstm.weight_ih_l0`, `lstm.weight_hh_l0`, ... like any other linear layer.
    2. What is excluded, or reads packed sequences, stays as it is, with the reason on record.

    Args:
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
    """

    def __init__(self, *, exclude: Sequence[str] = ()) -> None:
        self.exclude = tuple(exclude)

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        found = [node for node in graph_module.graph.nodes if isinstance(module_of(node), Recurrent)]
        if not found or any(isinstance(module_of(node), Collect) for node in graph_module.graph.nodes):
            return PassResult(graph_module, False)
        shapes = calibration.example(graph_module).shapes
        modified = False
        for node in found:
            packed = PACKED if not isinstance(shapes[input_of(node)], Size) else ""
            reason = "excluded" if matches(str(node.target), self.exclude) else annotation(node).changed or packed
            if reason:
                annotate(node, reason=reason)
                self.record(graph_module, "kept", node, reason=reason)
            else:
                _unroll(graph_module, node)
                modified = True
        return PassResult(graph_module, modified)


class RollUpRecurrent(Pass):
    """Makes one call of every recurrent layer again that `UnrollRecurrent` has written out."""

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        graph = graph_module.graph
        ends = [node for node in graph.nodes if isinstance(module_of(node), Collect)]
        for end in ends:
            first: Any = end.args[0]
            hx, products = first.args[:2]
            x, layer = input_of(products[0]), str(products[0].target).rpartition(".")[0]
            with graph.inserting_before(end):
                call = graph.call_module(layer, (x,) if hx is None else (x, hx))
            call.meta |= {key: value for key, value in end.meta.items() if key == "nn_module_stack"}
            end.replace_all_uses_with(call)
            _erase_unread(end)
        if hasattr(graph_module, UNROLLED):
            delattr(graph_module, UNROLLED)
        return PassResult(graph_module, bool(ends))


def _erase_unread(end: Node) -> None:
    """Take out a node that nobody reads any more, and what only it has read."""
    waiting, gone = [end], set[Node]()
    while waiting:
        node = waiting.pop()
        if node not in gone and not node.users:
            waiting += node.all_input_nodes
            gone.add(node)
            node.graph.erase_node(node)


def _unroll(graph_module: GraphModule, node: Node) -> None:
    """Write one call of a recurrent layer out."""
    layer = module_of(node)
    assert isinstance(layer, Recurrent)
    graph = graph_module.graph
    x: Any = input_of(node)
    hx: Any = node.kwargs.get("hx", node.args[1] if len(node.args) > 1 else None)

    def helper(name: str, module: Any, *args: Any) -> Node:
        path = f"{UNROLLED}.{node.name}.{name}"
        graph_module.add_submodule(path, module.eval())
        return graph.call_module(path, args)

    ways = 2 if layer.bidirectional else 1
    with graph.inserting_before(node):
        layers = []
        for number in range(layer.num_layers):
            places = range(number * ways, (number + 1) * ways)
            suffixes = [layer.suffixes[place] for place in places]
            products = [graph.call_module(f"{node.target}.weight_ih_{suffix}", (x,)) for suffix in suffixes]
            given = []
            for place, suffix, product in zip(places, suffixes, products, strict=True):
                states = helper(f"states_{suffix}", States(layer, place), product, hx)
                after = graph.call_module(f"{node.target}.weight_hh_{suffix}", (states,))
                if layer.proj_size:
                    inner = helper(f"unprojected_{suffix}", Unprojected(layer, place), product, after, hx)
                    after = graph.call_module(f"{node.target}.weight_hr_{suffix}", (inner,))
                given.append((product, after))
            scans = [Scan(layer, place) for place in places]
            layers.append(helper(f"outputs_l{number}", Outputs(*scans), hx, *given))
            x = graph.call_function(operator.getitem, (layers[-1], 0))  # What the next layer reads.
        end = helper("collect", Collect(layer.mode), *layers)
        graph.erase_node(x)
    end.meta |= {key: value for key, value in node.meta.items() if key == "nn_module_stack"}
    node.replace_all_uses_with(end)
    graph.erase_node(node)
