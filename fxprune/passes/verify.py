"""One check of a whole graph module, run after every compilation and, in tests, after every pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxprune.annotations import annotation
from fxprune.errors import GraphError
from fxprune.geometry import reduction_second
from fxprune.graph import module_of
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
    for node in graph_module.graph.nodes:
        report = annotation(node).report
        if report is None or not report.pattern:
            continue
        module = module_of(node)
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            raise GraphError(f"layer {report.name!r} is reported as pruned but has no weight")
        check = Pattern.parse(report.pattern).check(reduction_second(module))
        if not check.ok:
            raise GraphError(
                f"layer {report.name!r} is reported as {report.pattern}, but {check.violations} of {check.units} groups "
                "break that pattern"
            )
