"""CheckHooks: finds the modules whose value is not what their parameters say; to be run first.

A hook is code that can be read only by running it. So each layer's output is compared with W x + b of its own weights; where
there are hooks, with other weights too, since a hook may set the weights, or act only on some values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import annotate
from fxprune.calibration.batches import inputs_of, map_tensors, take, tensors_in
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.failures import stays_as_it_is
from fxprune.geometry import TRANSPOSED_CONVOLUTIONS, is_matrix_layer
from fxprune.graph import Runner, device_of, has_global_hooks, has_hooks, module_of
from fxprune.passes.base import CalibratedPass
from fxprune.runtime.precision import full_precision

IMAGES, FEW = 32, 4  # Where there are hooks, and where there are none.
ROUNDING = 64  # Units in the last place, relative to the largest value: the same kernel runs twice.


class CheckHooks(CalibratedPass):
    """Changes nothing; notes the reason on every call of a module whose value a hook changes, for the passes that follow."""

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        changed = changed_by_hooks(graph_module, calibration.first)
        for node in graph_module.graph.find_nodes(op="call_module"):
            if str(node.target) in changed:
                annotate(node, changed=changed[str(node.target)])
        return PassResult(graph_module, False)


def changed_by_hooks(graph_module: GraphModule, batch: Any) -> dict[str, str]:
    """The modules whose value is not what their parameters say, by name, with the reason and the remedy.

    Convolutions and linear layers are always looked at, other modules where they have hooks. What has hooks that only look
    is not among them.

    Args:
        graph_module: a traced graph in eval mode; it is run, and is as before afterwards.
        batch: of the calibration loader; some of its images are run.

    Raises:
        CalibrationError: if the batch cannot be used.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = list(inputs_of(batch, placeholders, device=device_of(graph_module)).values())
    run = _Comparison(graph_module)
    hooked = has_global_hooks() or any(map(has_hooks, graph_module.modules()))
    for chosen in (take(values, slice(IMAGES if hooked else FEW)), values):
        try:
            with torch.no_grad(), full_precision():
                run.run(*map_tensors(chosen, torch.clone))
        except Exception as error:  # It takes batches of one size only, or fails on these; that is told elsewhere.
            if stays_as_it_is(error):
                raise
        else:
            break
    return run.found


class _Comparison(Runner):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.found: dict[str, str] = {}

    def run_node(self, n: Node) -> Any:
        module = module_of(n)
        hooked = module is not None and (has_hooks(module) or has_global_hooks())
        if module is None or str(n.target) in self.found or not (hooked or is_matrix_layer(module)):
            return super().run_node(n)
        args, kwargs = map_tensors(self.fetch_args_kwargs_from_env(n), torch.clone)
        value = super().run_node(n)
        reason = _difference(module, args, kwargs, value)
        given = {"weight", "bias"} <= module._parameters.keys()  # Else a hook computes them; passes know that kind.
        if reason is None and hooked and given and is_matrix_layer(module):
            reason = _difference_with_other_weights(module, args, kwargs)
        if reason is not None:
            self.found[str(n.target)] = reason
        return value


def _difference(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> str | None:
    """Why a module's value is not what its class computes of its parameters, or None if it is."""
    wanted = _own_value(module, args, kwargs)
    pairs = list(zip(tensors_in([wanted]), tensors_in([value]), strict=False))
    if len(pairs) == len(list(tensors_in([value]))) and all(_alike(a, b) for a, b in pairs):
        return None
    what = "W x + b of its own weights" if is_matrix_layer(module) else f"what {type(module).__name__} computes"
    return (
        f"its output is not {what}: a hook changes it, or its forward was replaced; remove the hook, or put what it does into "
        "a module of its own"
    )


def _difference_with_other_weights(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The same for a copy with other weights; they are large and of other signs, so that a limit shows."""
    other, plain = copy.deepcopy(module), copy.deepcopy(module)
    for parameter in (*other.parameters(), *plain.parameters()):
        parameter.data = (-30.0 if parameter.dtype == torch.float16 else -1000.0) * parameter.data
    try:
        value = other(*map_tensors(args, torch.clone), **map_tensors(dict(kwargs), torch.clone))
    except Exception as error:
        if stays_as_it_is(error):
            raise
        return f"a hook fails when its weights are others ({type(error).__name__}: {error}); remove the hook"
    reason = _difference(plain, args, kwargs, value)
    return None if reason is None else f"with other weights {reason}"


def _own_value(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module's class computes, past all hooks."""
    args, kwargs = map_tensors(args, torch.clone), map_tensors(dict(kwargs), torch.clone)
    if not is_matrix_layer(module):
        return type(module).forward(module, *args, **kwargs)
    x = args[0] if args else kwargs["input"]
    if isinstance(module, nn.Linear):
        return F.linear(x, module.weight, module.bias)
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        forward: Any = type(module).forward
        return forward(module, *args, **kwargs)
    return module._conv_forward(x, module.weight, module.bias)


def _alike(wanted: Tensor, found: Tensor) -> bool:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    distance = float((wanted.double() - found.double()).abs().max()) if wanted.numel() else 0.0
    return distance <= ROUNDING * torch.finfo(wanted.dtype).eps * scale or not torch.isfinite(wanted).all()
