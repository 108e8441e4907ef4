"""Does a traced graph compute what the model computes? Tracing runs Python once, and some Python it cannot see.

A branch on `isinstance(x, Tensor)`, a Python counter or a change to an attribute leaves no node in the graph, and so no error.
One run of both on a few images of the first calibration batch tells. It also tells whether the images suit the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.calibration.batches import call_by_name, inputs_of, map_tensors, take, tensors_in
from fxprune.calibration.failures import (
    node_failure,
    remedy_for,
    said,
    stays_as_it_is,
    values_read,
    weight_of_convolution,
)
from fxprune.errors import CalibrationError
from fxprune.geometry import CONVOLUTIONS
from fxprune.graph import Runner, device_of, input_of, module_of
from fxprune.runtime.surroundings import same_random_numbers

IMAGES = 4
TOLERANCE = 1e-3  # Relative. Both run the same kernels, but TF32 or bfloat16 ones need not repeat exactly.


def difference(model: nn.Module, graph_module: GraphModule, batch: Any) -> str | None:
    """What is wrong with a traced graph, in words for the user; None if nothing is.

    Args:
        model: the model as it was traced, in eval mode, sharing its modules with the graph.
        graph_module: the trace.
        batch: a batch of a calibration loader.

    Raises:
        CalibrationError: if the batch cannot be used, the model fails on it, or it has no batch dimension.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    inputs = inputs_of(batch, placeholders, device=device_of(model))
    values = take(list(inputs.values()), slice(IMAGES))
    wanted = _outcome(model, placeholders, values)
    if isinstance(wanted, Exception):  # Perhaps it takes batches of one size only.
        values = list(inputs.values())
        wanted = _outcome(model, placeholders, values)
    run = _Run(graph_module)
    found = run.outcome(values)
    if isinstance(found, Exception) and isinstance(wanted, Exception):
        if isinstance(found, NotImplementedError):
            return None  # Perhaps it only runs on another device; calibration will tell.
        remedy = remedy_for(graph_module, values, found)
        raise node_failure(found, run.node, values_read(run), "calibration batch 0", remedy) from found
    if isinstance(found, Exception):
        problem = f"fails on the first calibration batch, and the model does not: {said(found)}"
    elif isinstance(wanted, Exception):
        problem = f"runs on the first calibration batch, and the model does not: {said(wanted)}"
    elif (apart := distance(wanted, found)) > TOLERANCE:
        problem = f"computes something else on the first calibration batch (relative difference {apart:.2g})"
        problem += _place(model, graph_module, placeholders, values)
    elif run.unbatched and (remedy := remedy_for(graph_module, values)):
        raise CalibrationError(f"calibration batch 0 does not suit the model. {remedy}")
    else:
        return None
    return (
        f"the graph that was traced from {type(model).__name__} {problem.rstrip('.')}. What tracing does not see are "
        "branches on isinstance or is_tensor, Python counters and attributes that change in forward, writes through a view, "
        "and hooks on the model as a whole. Name the module that does this in exclude to keep it whole as a leaf, or "
        "rewrite the line."
    )


class _Run(Runner):
    """Runs a graph and notes whether a layer has read an image, or a row of features, without a batch."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.unbatched = False

    def run_node(self, n: Node) -> Any:
        if (of_one := self._dimensions_of_one(n)) is not None:
            x = self.env[input_of(n)]
            self.unbatched |= isinstance(x, Tensor) and x.dim() == of_one
        return super().run_node(n)

    def _dimensions_of_one(self, node: Node) -> int | None:
        """How many dimensions one image has for a convolution, or one row for a linear layer."""
        module = module_of(node)
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return len(getattr(module, "kernel_size", ())) + 1
        weight = weight_of_convolution(node)
        return None if weight is None else self.env[weight].dim() - 1

    def outcome(self, values: list[Any]) -> Any:
        return _attempt(lambda: self.run(*_copies(values)))


def _outcome(module: nn.Module, placeholders: list[Node], values: list[Any]) -> Any:
    names = [str(node.target).lstrip("*") for node in placeholders]
    return _attempt(lambda: call_by_name(module, dict(zip(names, _copies(values), strict=True))))


def _copies(values: list[Any]) -> list[Any]:
    copies: list[Any] = map_tensors(values, torch.clone)
    return copies


def _attempt(run: Any) -> Any:
    """What a function returns, or the exception it raises. Random operations in it see the same numbers every time."""
    with torch.no_grad(), same_random_numbers():
        try:
            return run()
        except Exception as error:
            if stays_as_it_is(error):
                raise
            return error


def distance(wanted: Any, found: Any) -> float:
    """The largest relative difference of two nested outputs' tensors; infinite if they are not alike."""
    a, b = (list(tensors_in(value)) for value in (wanted, found))
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max(
        (_relative(x.double().nan_to_num(), y.double().nan_to_num()) for x, y in zip(a, b, strict=True)), default=0.0
    )


def _relative(wanted: Tensor, found: Tensor) -> float:
    distance, size = float((wanted - found).norm()), float(wanted.norm())
    return distance / size if size > 0 else float("inf") if distance > 0 else 0.0


def _place(model: nn.Module, graph_module: GraphModule, placeholders: list[Node], values: list[Any]) -> str:
    """Between which two modules the model and its graph part, in words."""
    after, at = _parting(model, graph_module, placeholders, values)
    if at:
        return f", for the first time after module {after!r} and before {at!r}" if after else f", before {at!r}"
    return f", after module {after!r}" if after else ""


def parting(model: nn.Module, graph_module: GraphModule, batch: Any) -> tuple[str, str]:
    """The last module that gives the same in a model and its graph on a batch, and the first that does not; "" for none."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = list(inputs_of(batch, placeholders, device=device_of(model)).values())
    return _parting(model, graph_module, placeholders, values)


def _parting(
    model: nn.Module, graph_module: GraphModule, placeholders: list[Node], values: list[Any]
) -> tuple[str, str]:
    called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
    called &= {name for name, _ in model.named_modules(remove_duplicate=False)}
    runs: list[list[tuple[str, Any]]] = []
    for module in (model, graph_module):
        outputs: list[tuple[str, Any]] = []
        hooks = [
            module.get_submodule(name).register_forward_hook(
                lambda m, args, output, name=name, outputs=outputs: outputs.append((name, _detached(output)))
            )
            for name in called
        ]
        _outcome(module, placeholders, values)
        for hook in hooks:
            hook.remove()
        runs.append(outputs)
    before = ""
    for (name, wanted), (other, found) in zip(*runs, strict=False):
        if name != other or distance(wanted, found) > TOLERANCE:
            return before, name
        before = name
    return before, ""


def _detached(output: Any) -> list[Tensor]:
    return [x.detach().clone() for x in tensors_in(output)]
