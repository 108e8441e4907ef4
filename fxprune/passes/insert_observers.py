"""InsertObservers: decides each layer's role, and puts an observer in front of every layer that will be solved."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.parametrize import is_parametrized

from fxprune.geometry import TRANSPOSED_CONVOLUTIONS, LayerGeometry, is_matrix_layer
from fxprune.graph import call_sites, input_of, is_tied, module_of
from fxprune.passes.base import Pass
from fxprune.passes.kept_layers import LAYERS, layers_inside, matrices_read
from fxprune.pattern import Pattern
from fxprune.statistics import HessianObserver
from fxprune.tracing import matches

OBSERVERS = "fxprune_observers"
TASK = "fxprune_task"
MAX_COLUMNS = 16_384  # A float64 Hessian of 2 GiB, of which solving needs several copies.
WEIGHT_FUNCTIONS = (
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.bilinear, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
PRODUCTS = (operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum)
PRODUCT_METHODS = ("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm")


@dataclass(frozen=True)
class LayerTask:
    """What is to become of one Conv or Linear call; kept in `node.meta["fxprune_task"]`.

    Attributes:
        role: "prune", "reconstruct" (re-fit, dense), or "keep".
        reason: why the layer is not pruned; "" for role "prune".
        geometry: how the layer reads its input; None for layers that are kept.
        pattern: the layer's own pattern where layers share a budget; None: the pattern of the whole run.
    """

    role: Literal["prune", "reconstruct", "keep"]
    reason: str = ""
    geometry: LayerGeometry | None = None
    pattern: Pattern | None = None


class Eligibility(Protocol):
    """Decides which layers can be compressed: a `Pattern`, for one."""

    def decline(self, geometry: LayerGeometry) -> str | None:
        """Why a layer of this geometry cannot be, or None if it can."""


class InsertObservers(Pass):
    """Annotates Conv and Linear calls with a `LayerTask` and inserts `HessianObserver` modules.

    Layers that read the same value in the same geometry share one observer, and so one Hessian.

    Args:
        pattern: decides which layers can be pruned, or factored.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        reconstruct: observe layers that the pattern declines, so that they can be re-fitted.
        changed: names of layers that do not compute W x + b, with the reason; see `changed_by_hooks`.
    """

    def __init__(
        self,
        pattern: Eligibility,
        *,
        exclude: Sequence[str] = (),
        reconstruct: bool = True,
        changed: Mapping[str, str] | None = None,
    ) -> None:
        self.pattern = pattern
        self.exclude = tuple(exclude)
        self.changed = changed or {}
        self.reconstruct = reconstruct

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        sites = call_sites(graph_module)
        observers: dict[tuple[Node, LayerGeometry], Node] = {}
        modified = False
        for node in list(graph_module.graph.nodes):
            for layer in layers_inside(node):
                self.record(graph_module, "kept", node, reason=f"{layer.name}: {layer.reason}")
            if TASK in node.meta or not reads_weights(node):
                continue
            task = self._task(graph_module, node, sites)
            node.meta[TASK] = task
            if task.reason:
                self.record(graph_module, "kept", node, reason=task.reason)
            if task.geometry is not None:
                source = input_of(node)
                key = (source, replace(task.geometry, out_channels=task.geometry.groups))
                if key not in observers:
                    observers[key] = _insert_observer(graph_module, node, source, key[1])
                node.replace_input_with(source, observers[key])
            modified = True
        return PassResult(graph_module, modified)

    def _task(self, graph_module: GraphModule, node: Node, sites: dict[nn.Module, list[Node]]) -> LayerTask:
        reason = self._reason_to_keep(graph_module, node, sites)
        if reason is not None:
            return LayerTask("keep", reason)
        module = module_of(node)
        assert module is not None
        geometry = LayerGeometry.of(module)
        declined = self.pattern.decline(geometry)
        if declined is None:
            return LayerTask("prune", "", geometry)
        return LayerTask("reconstruct", declined, geometry) if self.reconstruct else LayerTask("keep", declined)

    def _reason_to_keep(self, graph_module: GraphModule, node: Node, sites: dict[nn.Module, list[Node]]) -> str | None:
        """Why a layer's weights must not be touched at all, or None."""
        module = module_of(node)
        if module is None:
            return f"a functional call in {_place(node)}: its weight belongs to no nn.Conv2d or nn.Linear module"
        if matches(str(node.target), self.exclude):
            return "excluded"
        if isinstance(module, TRANSPOSED_CONVOLUTIONS):
            return "transposed convolutions are not pruned"
        if is_parametrized(module):
            return "parametrized: its weight is computed; call torch.nn.utils.parametrize.remove_parametrizations first"
        if not is_matrix_layer(module):
            return f"{type(module).__name__} is not exactly a Conv1d, Conv2d, Conv3d or Linear"
        computed = next((name for name in ("weight", "bias") if name not in module._parameters), None)
        if computed is not None:
            remedy = "call torch.nn.utils.remove_weight_norm, prune.remove or the like first"
            return f"its {computed} is computed by a hook; {remedy}"
        if str(node.target) in self.changed:
            return self.changed[str(node.target)]
        if len(sites[module]) > 1:
            return f"shared: called at {len(sites[module])} places with different inputs"
        if is_tied(graph_module, module.weight):
            return "its weight is shared with another part of the model"
        if module.weight.dtype not in (torch.float32, torch.float64):
            return f"its weight is {module.weight.dtype}; statistics need float32 or float64"
        columns = LayerGeometry.of(module).columns
        if columns > MAX_COLUMNS:
            return f"{columns:,} inputs to an output: the Hessian alone would take {8 * columns**2 / 2**30:.1f} GiB"
        return None


def reads_weights(node: Node) -> bool:
    """Whether a node is a call of a Conv or Linear module, or a function or product with a parameter in its place."""
    if node.op == "call_function" and node.target in WEIGHT_FUNCTIONS:
        return True
    if node.target in (PRODUCTS if node.op == "call_function" else PRODUCT_METHODS):
        return bool(matrices_read(node))
    return isinstance(module_of(node), LAYERS)


def _place(node: Node) -> str:
    """The module in whose forward a node was traced, in words."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "the model's own forward"
    name, kind = list(stack.values())[-1]
    return f"module {name!r} ({getattr(kind, '__name__', kind)})"


def _insert_observer(graph_module: GraphModule, layer: Node, source: Node, geometry: LayerGeometry) -> Node:
    name = f"{OBSERVERS}.{layer.name}"
    graph_module.add_submodule(name, HessianObserver(geometry))
    with graph_module.graph.inserting_before(layer):
        return graph_module.graph.call_module(name, (source,))
