"""One check of a whole graph module, run after every compilation and, in tests, after every pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.annotations import annotation, report_of
from fxprune.errors import GraphError
from fxprune.geometry import reduction_second
from fxprune.graph import module_of
from fxprune.layers.recurrent import Recurrent
from fxprune.pattern import Pattern


def verify(graph_module: GraphModule) -> None:
    """Raise GraphError unless the graph is well formed, all parameters are finite, and claimed patterns hold.

    Raises:
        GraphError: names the layer or parameter.
    """
    graph_module.graph.lint()
    for name, parameter in graph_module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise GraphError(f"parameter {name!r} holds NaN or infinite values")
    of_nodes = [(annotation(node).report, module_of(node)) for node in graph_module.graph.nodes]
    found = report_of(graph_module)
    # Matrices of recurrent layers have rows, and no node of their own.
    inside = [(row, _inside(graph_module, row.name)) for row in (() if found is None else found.layers)]
    for report, module in [*of_nodes, *((row, module) for row, module in inside if module is not None)]:
        if report is None or not report.pattern:
            continue
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            raise GraphError(f"layer {report.name!r} is reported as pruned but has no weight")
        check = Pattern.parse(report.pattern).check(reduction_second(module))
        if not check.ok:
            raise GraphError(
                f"layer {report.name!r} is reported as {report.pattern}, but {check.violations} of {check.units} groups "
                "break that pattern"
            )


def _inside(graph_module: GraphModule, name: str) -> nn.Module | None:
    """The matrix of a recurrent layer that a row is about, or None."""
    owner, _, last = name.rpartition(".")
    layer = dict(graph_module.named_modules(remove_duplicate=False)).get(owner)
    return layer.get_submodule(last) if isinstance(layer, Recurrent) else None
