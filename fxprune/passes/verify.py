"""One check of a whole graph module, run after every compilation and, in tests, after every pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.annotations import annotation, report_of
from fxprune.errors import GraphError
from fxprune.geometry import reduction_second
from fxprune.graph import module_of
from fxprune.layers.recurrent import Recurrent
from fxprune.pattern import Pattern
from fxprune.report import LayerReport


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
    for report, module in [*of_nodes, *_of_recurrent_layers(graph_module, () if found is None else found.layers)]:
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


def _of_recurrent_layers(graph_module: GraphModule, rows: Iterable[LayerReport]) -> list[tuple[LayerReport, nn.Module]]:
    """The rows about matrices of recurrent layers, which have no node of their own, and these matrices."""
    layers = {n: m for n, m in graph_module.named_modules(remove_duplicate=False) if isinstance(m, Recurrent)}
    parts = [(row, *row.name.rpartition(".")) for row in rows]
    return [(row, layers[owner].get_submodule(last)) for row, owner, _, last in parts if owner in layers]
