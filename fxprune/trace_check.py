"""Does a traced graph compute what the model computes? Tracing runs Python once, and some Python it cannot see.

A branch on `isinstance(x, Tensor)`, a Python counter or a change to an attribute leaves no node in the graph, and so no error.
One run of both on a few images of the first calibration batch tells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxprune.calibration.batches import assign
from fxprune.graph import device_of

IMAGES = 4
TOLERANCE = 1e-3  # Relative. Both run the same kernels, but TF32 or bfloat16 ones need not repeat exactly.


def difference(model: nn.Module, graph_module: GraphModule, batch: Any) -> str | None:
    """What is wrong with a traced graph, in words for the user; None if nothing is.

    A batch on which both fail says nothing about the trace; calibration will name the place.

    Args:
        model: the model as it was traced, in eval mode, sharing its modules with the graph.
        graph_module: the trace.
        batch: a batch of a calibration loader.

    Raises:
        CalibrationError: if the batch cannot be used.
    """
    device = device_of(model)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    inputs = {
        str(node.target): x.to(device) for node, x in assign(placeholders, batch).items() if isinstance(x, Tensor)
    }
    few = {name: x[:IMAGES] for name, x in inputs.items()}
    wanted = _outcome(model, few)
    if isinstance(wanted, Exception):  # Perhaps it takes batches of one size only.
        few, wanted = inputs, _outcome(model, inputs)
    found = _outcome(graph_module, few)
    if isinstance(wanted, Exception) and isinstance(found, Exception):
        return None
    if isinstance(found, Exception):
        problem = f"fails on the first calibration batch, and the model does not: {found}"
    elif isinstance(wanted, Exception):
        problem = f"runs on the first calibration batch, and the model does not: {wanted}"
    elif (distance := _distance(wanted, found)) > TOLERANCE:
        problem = f"computes something else on the first calibration batch (relative difference {distance:.2g})"
        problem += _place(model, graph_module, few)
    else:
        return None
    return (
        f"the graph that was traced from {type(model).__name__} {problem.rstrip('.')}. What tracing does not see are "
        "branches on isinstance or is_tensor, Python counters and attributes that change in forward, and writes through "
        "a view. Name the module that does this in exclude to keep it whole as a leaf, or rewrite the line."
    )


def _outcome(module: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """What a module returns, or the exception it raises. Random operations in it see the same numbers every time."""
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        try:
            return module(**{name: x.clone() for name, x in inputs.items()})
        except Exception as error:
            return error


def _distance(wanted: Any, found: Any) -> float:
    """The largest relative difference of two nested outputs' tensors; infinite if they are not alike."""
    a, b = ([x for x in tree_leaves(value) if isinstance(x, Tensor)] for value in (wanted, found))
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max(
        (_relative(x.double().nan_to_num(), y.double().nan_to_num()) for x, y in zip(a, b, strict=True)), default=0.0
    )


def _relative(wanted: Tensor, found: Tensor) -> float:
    distance, size = float((wanted - found).norm()), float(wanted.norm())
    return distance / size if size > 0 else float("inf") if distance > 0 else 0.0


def _place(model: nn.Module, graph_module: GraphModule, inputs: dict[str, Tensor]) -> str:
    """Between which two modules the model and its graph part, in words."""
    after, at = _parting(model, graph_module, inputs)
    if at:
        return f", for the first time after module {after!r} and before {at!r}" if after else f", before {at!r}"
    return f", after module {after!r}" if after else ""


def parting(model: nn.Module, graph_module: GraphModule, batch: Any) -> tuple[str, str]:
    """The last module that gives the same in a model and its graph on a batch, and the first that does not; "" for none."""
    device = device_of(model)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    inputs = {str(n.target): x.to(device) for n, x in assign(placeholders, batch).items() if isinstance(x, Tensor)}
    return _parting(model, graph_module, inputs)


def _parting(model: nn.Module, graph_module: GraphModule, inputs: dict[str, Tensor]) -> tuple[str, str]:
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
        _outcome(module, inputs)
        for hook in hooks:
            hook.remove()
        runs.append(outputs)
    before = ""
    for (name, wanted), (other, found) in zip(*runs, strict=False):
        if name != other or _distance(wanted, found) > TOLERANCE:
            return before, name
        before = name
    return before, ""


def _detached(output: Any) -> list[Tensor]:
    return [x.detach().clone() for x in tree_leaves(output) if isinstance(x, Tensor)]
