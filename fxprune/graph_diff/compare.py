"""diff(): reads two models, matches their nodes and compares them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxprune.compiled_parts import CompiledParts
from fxprune.errors import GraphError, TraceError
from fxprune.graph.model_argument import not_a_model
from fxprune.graph_diff.matching import match_graphs
from fxprune.graph_diff.model_graph import ModelGraph
from fxprune.graph_diff.node_diff import Comparison
from fxprune.graph_diff.parts import parts_diff
from fxprune.graph_diff.read_fx import read_fx
from fxprune.graph_diff.read_onnx import read_onnx_graph
from fxprune.graph_diff.result import Costs, Edge, GraphDiff, NodeDiff, NodeState
from fxprune.tracing import trace

Model = nn.Module | str | PathLike[str]


@torch.no_grad()
def diff(before: Model, after: Model, *, example_inputs: Any = None) -> GraphDiff:
    """Say what changed from one model to another.

    Nodes are matched by name and by structure (see `fxprune.graph_diff.matching`). In-place operations count as the
    same as their out-of-place forms, since they compute the same values.

    Args:
        before: a module (a traced copy is compared), a GraphModule or compiled result (read as it is, never modified),
            or the path of an ONNX file.
        after: likewise; an ONNX file is compared with an ONNX file. Of a model with compiled parts these are compared, one
            after the other, with the modules of the same names.
        example_inputs: a tensor, a tuple of the models' inputs, or a dict of them by name: both models are run on them
            once for the sizes of activations, which MACs need; and a module that can be traced on an example only is traced
            on this one. ONNX files state sizes themselves.

    Returns:
        The difference: `print` it, or write it with `.to_html(path)` or `.to_json(path)`.

    Raises:
        TraceError: a module cannot be traced, or only on example_inputs, which were not given.
        GraphError: one side is a model and the other a file, the two have no layer in common, or a model cannot run on the
            inputs.
        ExportError: example_inputs does not fit a model's inputs.
        ValidationError: a file is not a complete ONNX file.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(diff(model, model))
        Sequential and Sequential are the same: no difference in 5 nodes and 312 parameters.
    """
    for given in (before, after):
        if not isinstance(given, (nn.Module, str, PathLike)):
            raise GraphError(not_a_model(given))
    if isinstance(before, CompiledParts) or isinstance(after, CompiledParts):
        if isinstance(before, nn.Module) and isinstance(after, nn.Module):
            return parts_diff(before, after, example_inputs, diff)
    if isinstance(before, nn.Module) and isinstance(after, nn.Module):
        old = read_fx(_graph_module(before, after, example_inputs), example_inputs)
        new = read_fx(_graph_module(after, before, example_inputs), example_inputs)
    elif isinstance(before, nn.Module) or isinstance(after, nn.Module):
        model, file = (before, after) if isinstance(before, nn.Module) else (after, before)
        raise GraphError(
            f"cannot compare {type(model).__name__}, a model, with {file}, a file: export the model with "
            "fxprune.export_onnx and compare two files, or load the file's model and compare two models"
        )
    else:
        old, new = read_onnx_graph(Path(before)), read_onnx_graph(Path(after))
    found = compare_graphs(old, new)
    _require_related(found)
    return found


def compare_graphs(before: ModelGraph, after: ModelGraph) -> GraphDiff:
    """Match and compare two graphs."""
    matching = match_graphs(before, after)
    comparison = Comparison.of(before, after, matching)
    back = {new: old for old, new in matching.pairs.items()}
    keys = _merged_order(before, after, back)
    nodes = []
    for old, new in keys:
        if old and new:
            nodes.append(comparison.matched(old, new))
        else:
            nodes.append(comparison.removed(old) if old else comparison.inserted(new))
    place = {("before", old): i for i, (old, _) in enumerate(keys)} | {
        ("after", new): i for i, (_, new) in enumerate(keys)
    }
    edges = {
        side: {(place[side, source], place[side, n.id]) for n in graph.nodes for source in n.inputs}
        for side, graph in (("before", before), ("after", after))
    }
    return GraphDiff(
        before=before.title,
        after=after.title,
        nodes=tuple(nodes),
        edges=tuple(
            Edge(*edge, before=edge in edges["before"], after=edge in edges["after"])
            for edge in sorted(edges["before"] | edges["after"])
        ),
        costs_before=graph_costs(before, comparison.states_before),
        costs_after=graph_costs(after, comparison.states_after),
        notes=_notes(comparison, nodes),
    )


def _require_related(found: GraphDiff) -> None:
    """Raise for two networks of which neither was made of the other: no layer with weights has a counterpart.

    A counterpart has the same operation and the same name or size of weight, or is several that make one layer together.
    """
    sides = {
        side: [s for node in found.nodes if (s := getattr(node, side)) is not None and s.weights]
        for side in ("before", "after")
    }
    pairs = [(node.before, node.after) for node in found.nodes if node.before is not None and node.after is not None]
    alike = any(
        old.op == new.op and old.weights and (_size(old) == _size(new) or old.node == new.node) for old, new in pairs
    )
    several = any(node.status == "replaced" and node.weight_change is not None for node in found.nodes)
    if alike or several or not all(sides.values()):
        return
    told = [
        f"{title} ({len(layers)} layer{'s' if len(layers) > 1 else ''} with weights, such as {first.node}, "
        f"{first.op} {'x'.join(map(str, _size(first)))})"
        for title, layers in zip((found.before, found.after), sides.values(), strict=True)
        for first in layers[:1]
    ]
    raise GraphError(
        f"{' and '.join(told)} are different networks: no layer of the one is in the other. Compare a model with what was made "
        "of it, such as the dense model with what fxprune.compile returned, or the ONNX files of both"
    )


def _size(state: NodeState) -> tuple[int, ...]:
    """Of a node's weight, or how many weights a recurrent layer has."""
    return state.weight_shape or (state.weights,)


def _graph_module(model: nn.Module, other: nn.Module, example: Any) -> GraphModule:
    """The model itself if it is a graph, else a traced copy, with the leaves that the other one's graph has."""
    if isinstance(model, GraphModule):
        return model
    names = {name for name, _ in model.named_modules() if name}
    called = other.graph.nodes if isinstance(other, GraphModule) else ()
    leaves = {str(node.target) for node in called if node.op == "call_module"}
    exclude = sorted(leaves & names)
    try:
        return trace(model, exclude=exclude)
    except TraceError as error:
        if example is None:
            raise TraceError(
                f"{error}\nPerhaps on an example: call diff with example_inputs, a batch of images"
            ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What stays whole is whole in both graphs, or a difference.
        return trace(model, exclude=exclude, example=example)


def _merged_order(before: ModelGraph, after: ModelGraph, back: dict[str, str]) -> list[tuple[str, str]]:
    """(id before or "", id after or "") for every node: the order after, with each removed node where it was."""
    following: dict[str, list[str]] = {"": []}
    last = ""
    matched = set(back.values())
    for node in before.nodes:
        if node.id in matched:
            last = node.id
        following.setdefault(last, [])
        if node.id not in matched:
            following[last].append(node.id)
    order = [(name, "") for name in following[""]]
    for node in after.nodes:
        old = back.get(node.id, "")
        order.append((old, node.id))
        order.extend((name, "") for name in following.get(old, []) if old)
    return order


def _notes(comparison: Comparison, nodes: list[NodeDiff]) -> tuple[str, ...]:
    """Changes without consequence, and what the graphs say about themselves."""
    pairs = comparison.matching.pairs
    inplace = sum(comparison.old[old].inplace != comparison.new[new].inplace for old, new in pairs.items())
    notes = []
    if inplace:
        notes.append(
            f"Nodes that differ only in working in place or not: {inplace}. The values are the same: no change."
        )
    if comparison.has_unknown_order:
        notes.append("Channels were permuted, and it is not recorded how: by how much weights changed cannot be told.")
    if permuted := sum(any("permuted" in change for change in node.changes) for node in nodes):
        how = " The order was found by matching the weights." if comparison.orders_found else ""
        notes.append(
            f"Channels of {permuted} nodes were permuted; before and after are compared in the same order.{how}"
        )
    if comparison.before.compressed and any(node.status != "unchanged" for node in nodes):
        notes.append(
            f"{comparison.before.title}, which everything is measured against, is itself {comparison.before.compressed}: "
            "changes and output errors are relative to it, not to the network as it was trained."
        )
    if comparison.before.shapes_known != comparison.after.shapes_known:
        notes.append("Sizes of activations are known for one of the two graphs only.")
    own = [f"{graph.title}: {note}" for graph in (comparison.before, comparison.after) for note in graph.notes]
    return tuple(dict.fromkeys([*notes, *own]))


def graph_costs(graph: ModelGraph, states: Mapping[str, NodeState]) -> Costs:
    """Count a graph's parameters and MACs; `states` by node id."""
    macs, nonzero = 0, 0
    for node in graph.nodes:
        state = states[node.id]
        if state.macs is not None:
            macs += state.macs
            nonzero += round(state.macs * state.nonzeros / state.weights) if state.weights else state.macs
    known = graph.shapes_known
    return Costs(
        nodes=len(graph.nodes),
        parameters=sum(p.numel() for p in graph.parameters.values()),
        nonzeros=sum(int(torch.count_nonzero(p)) for p in graph.parameters.values()),
        macs=macs if known else None,
        nonzero_macs=nonzero if known else None,
    )
