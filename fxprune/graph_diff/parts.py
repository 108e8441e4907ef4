"""The difference of models with compiled parts: those of the parts, as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from fxprune.calibration.calls import Reading, calls_of
from fxprune.compiled_parts import CompiledParts
from fxprune.errors import GraphError
from fxprune.graph_diff.result import Costs, Edge, GraphDiff, NodeDiff
from fxprune.operations import LAYERS


def parts_diff(before: nn.Module, after: nn.Module, batch: Any, diff: Callable[..., GraphDiff]) -> GraphDiff:
    """What changed in the parts.

    Args:
        before: a model, or one with compiled parts.
        after: likewise; one of the two has parts.
        batch: as the models take it, or None.
        diff: compares a part with the module of its name in the other model.

    Raises:
        GraphError: the other model has no module of a part's name.
        TraceError: a module can be traced on its inputs only, and no batch was given.
        CalibrationError: a model fails on the batch.
    """
    compiled = after if isinstance(after, CompiledParts) else before
    assert isinstance(compiled, CompiledParts)
    old, new = (model.model if isinstance(model, CompiledParts) else model for model in (before, after))
    try:
        pairs = {path: (old.get_submodule(path), new.get_submodule(path)) for path in compiled.paths}
    except AttributeError as error:
        raise GraphError(
            f"the models are not of one class: one has no module for a part of the other ({error})"
        ) from error
    inputs: dict[str, dict[str, Any]] = {}
    if batch is not None:
        reading = Reading.of(old, batch)
        training = old.training
        calls = calls_of(lambda: reading.run(old.eval(), batch), {path: pair[0] for path, pair in pairs.items()})
        old.train(training)
        inputs = {path: of[0].inputs for path, of in calls.items() if of and of[0].inputs is not None}
    pairs = {path: (_layer_in_one(a), _layer_in_one(b)) for path, (a, b) in pairs.items()}
    found = {path: diff(*pair, example_inputs=inputs.get(path)) for path, pair in pairs.items()}
    nodes: list[NodeDiff] = []
    edges: list[Edge] = []
    for path, part in found.items():
        edges += [replace(e, source=e.source + len(nodes), target=e.target + len(nodes)) for e in part.edges]
        nodes += [_renamed(node, path) for node in part.nodes]
    report = compiled.report
    titles = [
        f"{type(old).__name__}",
        f"{type(new).__name__} with parts pruned to {report.pattern} with {report.method}",
    ]
    return GraphDiff(
        before=titles[isinstance(before, CompiledParts)],
        after=titles[isinstance(after, CompiledParts)],
        nodes=tuple(nodes),
        edges=tuple(edges),
        costs_before=_sum([part.costs_before for part in found.values()]),
        costs_after=_sum([part.costs_after for part in found.values()]),
        notes=tuple(f"{path}: {note}" for path, part in found.items() for note in part.notes),
    )


def _layer_in_one(module: nn.Module) -> nn.Module:
    """A layer by itself as the graph of a part that is one layer has it."""
    return nn.Sequential(module) if isinstance(module, LAYERS) else module


def _renamed(node: NodeDiff, path: str) -> NodeDiff:
    """A node under its name in the whole model."""
    into, folded = (tuple(f"{path}.{name}" for name in names) for names in (node.into, node.folded))
    return replace(node, name=f"{path}.{node.name}", into=into, folded=folded)


def _sum(costs: list[Costs]) -> Costs:
    """Of all parts; not their MACs, since a head may be called any number of times for an image."""
    return Costs(*(sum(getattr(cost, name) for cost in costs) for name in ("nodes", "parameters", "nonzeros")))
