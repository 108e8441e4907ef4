"""Report rows of layers that are not touched: those that a pass declined, and those inside modules called as a whole."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from fxprune.annotations import annotation
from fxprune.graph import module_of
from fxprune.operations import LAYERS, called_name
from fxprune.report import LayerReport

# Modules of torch.nn whose own parameters are matrices; the tracer never looks inside them.
WITH_MATRICES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


def kept_layer(node: Node, reason: str) -> LayerReport:
    """The report of a Conv or Linear call that was left as it is."""
    module = module_of(node)
    if module is None:
        op = called_name(node) or str(node.target)
        return _kept(node.name, op, next(iter(matrices_read(node)), None), reason)
    weight = getattr(module, "weight", None)
    return _kept(str(node.target), type(module).__name__, weight if isinstance(weight, Tensor) else None, reason)


def layers_inside(node: Node) -> tuple[LayerReport, ...]:
    """A report for every layer inside a module that the graph calls as a whole; () for a Conv or Linear call."""
    module = module_of(node)
    if module is None or isinstance(module, LAYERS):
        return ()
    as_a_whole = f"inside {str(node.target)!r} ({type(module).__name__}), which is called as a whole"
    reason = annotation(node).reason or as_a_whole
    reports = []
    for path, inner in module.named_modules():
        name = f"{node.target}.{path}" if path else str(node.target)
        if isinstance(inner, LAYERS):
            weight: Any = inner.weight
            reports.append(_kept(name, type(inner).__name__, weight, reason))
        elif isinstance(inner, WITH_MATRICES):
            matrices = [(key, p) for key, p in inner.named_parameters(recurse=False) if p.dim() >= 2]
            reports += [_kept(f"{name}.{key}", type(inner).__name__, p, reason) for key, p in matrices]
    return tuple(reports)


def matrices_read(node: Node) -> list[nn.Parameter]:
    """The parameters of two or more dimensions that a node reads directly (get_attr), not through a module."""
    root = node.graph.owning_module
    names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    values = [] if root is None else [attrgetter(name)(root) for name in names]
    return [value for value in values if isinstance(value, nn.Parameter) and value.dim() >= 2]


def zeros(weight: Tensor) -> float:
    """Share of zeros."""
    return float((weight == 0).double().mean())


def _kept(name: str, op: str, weight: Tensor | None, reason: str) -> LayerReport:
    shape, sparsity = ((), 0.0) if weight is None else (tuple(weight.shape), zeros(weight))
    return LayerReport(name=name, op=op, shape=shape, reason=reason, sparsity=sparsity)
