"""GraphNode -> NodeState, and what a whole graph costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.export.inspection import PATTERNS, held_patterns
from fxprune.graph_diff.model_graph import GraphNode, ModelGraph
from fxprune.graph_diff.result import Costs, NodeState

_LEAST_SPARSITY = min(pattern.sparsity for pattern in PATTERNS)


def node_state(node: GraphNode) -> NodeState:
    """Sum up a node, without its tensors."""
    weight = node.weights.weight
    learnt = [t.numel() for name, t in node.weights.others.items() if "running_" not in name and t.is_floating_point()]
    state = NodeState(
        node=node.id,
        op=node.op,
        arguments=dict(node.arguments),
        output_shape=node.output_shape,
        parameters=sum(learnt),
        multiply_adds=node.multiply_adds,
    )
    if weight is None:
        return state
    nonzeros = int(torch.count_nonzero(weight))
    sparsity = 1 - nonzeros / max(weight.numel(), 1)
    numbers = {
        "weight_shape": tuple(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "parameters": state.parameters + weight.numel(),
        "nonzeros": nonzeros,
        "sparsity": sparsity,
        "pattern": node.pattern or _patterns(node, weight, sparsity),
    }
    return NodeState(**{**vars(state), **numbers})


def _patterns(node: GraphNode, weight: Tensor, sparsity: float) -> str:
    if weight.dim() < 2 or sparsity < _LEAST_SPARSITY:
        return ""
    reduced = weight.transpose(0, 1) if node.weights.transposed else weight
    return ", ".join(map(str, held_patterns(reduced)))


def graph_costs(graph: ModelGraph, states: Mapping[str, NodeState]) -> Costs:
    """Count a graph's parameters and multiply-adds; `states` by node id."""
    multiply_adds, nonzero = 0, 0
    for node in graph.nodes:
        state = states[node.id]
        if state.multiply_adds is not None:
            multiply_adds += state.multiply_adds
            weights = node.weights.weight.numel() if node.weights.weight is not None else 0
            nonzero += round(state.multiply_adds * state.nonzeros / weights) if weights else state.multiply_adds
    known = graph.shapes_known
    return Costs(
        nodes=len(graph.nodes),
        parameters=sum(p.numel() for p in graph.parameters.values()),
        nonzeros=sum(int(torch.count_nonzero(p)) for p in graph.parameters.values()),
        multiply_adds=multiply_adds if known else None,
        nonzero_multiply_adds=nonzero if known else None,
    )
