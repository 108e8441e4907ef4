"""GraphModule -> ModelGraph. The graph module is read, never changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.annotations import annotation, changes, report_of
from fxprune.fine_tuning.recorded_zeros import FilledZeros, filled_zeros
from fxprune.graph_diff.fx_operation import is_inplace, operation_arguments, operation_name, read_nodes
from fxprune.graph_diff.fx_shapes import output_shapes
from fxprune.graph_diff.fx_weights import PRODUCTS, node_parameters, node_weights
from fxprune.graph_diff.model_graph import GraphNode, ModelGraph, Weights, weight_multiply_adds


def read_fx(graph_module: GraphModule, example_inputs: Any = None) -> ModelGraph:
    """Read a graph module.

    Args:
        graph_module: run once in eval mode if there are inputs; its training flags are put back.
        example_inputs: a tensor, a tuple of the model's inputs, or a dict of them by name; None leaves sizes of
            activations and multiply-adds unknown.

    Raises:
        ExportError: example_inputs does not fit the model's inputs.
        GraphError: the graph cannot run on them.
    """
    filled = filled_zeros(graph_module)
    shapes = {} if example_inputs is None else output_shapes(graph_module, example_inputs)
    calls = Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    seen: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    nodes: list[GraphNode] = []
    parameters: dict[int, tuple[str, nn.Parameter]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            continue
        seen[str(node.target)] += 1
        call = seen[str(node.target)] if calls[str(node.target)] > 1 else 0
        read = _read_node(graph_module, node, call, shapes, filled)
        nodes.append(read)
        own = node_parameters(graph_module, node)
        for name, parameter in own:
            parameters.setdefault(id(parameter), (name, parameter))
        if node.op == "call_module" and read.multiply_adds is None and any(p.dim() > 1 for _, p in own):
            uncounted[read.op] += 1
    return ModelGraph(
        title=_title(graph_module, filled),
        nodes=tuple(nodes),
        parameters={name: parameter.detach() for name, parameter in parameters.values()},
        changes=changes(graph_module),
        shapes_known=bool(shapes),
        notes=(
            *([f"{filled}."] if filled else []),
            *(
                f"Multiply-adds leave out what happens inside {op} ({calls} calls)."
                for op, calls in uncounted.items()
                if shapes
            ),
        ),
    )


def _title(graph_module: GraphModule, filled: FilledZeros) -> str:
    report = report_of(graph_module)
    pruned = f" pruned to {report.pattern} with {report.method}" if report is not None else ""
    return f"{graph_module._get_name()}{pruned}{', zeros filled in since' if filled else ''}"


def _read_node(
    graph_module: GraphModule, node: Node, call: int, shapes: Mapping[Node, tuple[int, ...]], filled: FilledZeros
) -> GraphNode:
    """One node that is not get_attr; `call` counts the calls of a module that has several, and is 0 otherwise."""
    report = annotation(node).report
    lost = filled.layers.get(report.name, 0) if report else 0
    weights = node_weights(graph_module, node)
    name, key = node.name, ""
    if node.op == "call_module":
        name = f"{node.target} (call {call})" if call else str(node.target)
        key = "" if call else f"module:{node.target}"
    elif node.op in ("placeholder", "output"):
        key = f"{node.op}:{node.target}"
    elif weights.weight is not None:
        key = "weight:" + next(str(a.target) for a in node.all_input_nodes if a.op == "get_attr")
    return GraphNode(
        id=node.name,
        name=name,
        key=key,
        op=operation_name(node),
        arguments=operation_arguments(node),
        inputs=tuple(source.name for source in read_nodes(node) if source.op != "get_attr"),
        weights=weights,
        order=_order(node),
        inplace=is_inplace(node),
        output_shape=shapes.get(node),
        multiply_adds=_multiply_adds(node, weights, shapes),
        status=report.status if report and not lost else "",
        pattern=report.pattern if report and not lost else "",
        output_error=report.relative_error if report else None,
        reason=f"{lost:,} of its zeros have been filled in" if lost else report.reason if report else "",
    )


def _order(node: Node) -> tuple[Tensor | None, Tensor | None]:
    """What a permutation of channels wrote down: the former places of the input's and of the output's channels."""
    inputs, outputs = annotation(node).order
    return (
        None if inputs is None else torch.as_tensor(inputs, dtype=torch.long),
        None if outputs is None else torch.as_tensor(outputs, dtype=torch.long),
    )


def _multiply_adds(node: Node, weights: Weights, shapes: Mapping[Node, tuple[int, ...]]) -> int | None:
    """Multiply-adds for one sample: of a layer with a weight, or of a product of two activations."""
    sources = [source for source in read_nodes(node) if source.op != "get_attr"]
    if node not in shapes or not sources or sources[0] not in shapes:
        return None
    if weights.weight is not None:
        return weight_multiply_adds(weights, shapes[sources[0]], shapes[node])
    if node.op != "call_module" and operation_name(node) in PRODUCTS:
        return math.prod(shapes[node][1:]) * shapes[sources[0]][-1]
    return None
