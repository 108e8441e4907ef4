"""InsertObservers: decides each layer's role and constraints, and puts an observer before every layer to be solved."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.parametrize import is_parametrized

from fxprune.annotations import Annotation, annotate, annotation
from fxprune.calibration.observers import OBSERVERS
from fxprune.constraints import Chain, Constraint
from fxprune.geometry import LAYERS, TRANSPOSED_CONVOLUTIONS, LayerGeometry, is_matrix_layer
from fxprune.graph import call_sites, input_of, is_tied, module_of
from fxprune.layers.kept import layers_inside, matrices_read
from fxprune.passes.base import Pass
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import matches

MAX_COLUMNS = 16_384  # A float64 Hessian of 2 GiB, of which solving needs several copies.
WEIGHT_FUNCTIONS = (
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.bilinear, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
PRODUCTS = (operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum)
PRODUCT_METHODS = ("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm")


class InsertObservers(Pass):
    """Annotates Conv and Linear calls with role and constraints, and inserts `HessianObserver` modules.

    Layers that read the same value in the same geometry share one observer, and so one Hessian.

    Args:
        recipe: under which constraints each layer is solved.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        reconstruct: observe layers that stay dense, so that they can be re-fitted.
        observe: whether layers are solved from statistics, whose size sets a limit to their columns.

    Raises:
        PatternError: a name in the recipe matches no layer.
    """

    def __init__(
        self, recipe: Recipe, *, exclude: Sequence[str] = (), reconstruct: bool = True, observe: bool = True
    ) -> None:
        self.recipe = recipe
        self.exclude = tuple(exclude)
        self.reconstruct = reconstruct
        self.observe = observe

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        layers = [node for node in graph_module.graph.nodes if reads_weights(node)]
        self.recipe.check([str(node.target) for node in layers if module_of(node) is not None])
        sites = call_sites(graph_module)
        observers: dict[tuple[Node, LayerGeometry], Node] = {}
        modified = False
        for node in list(graph_module.graph.nodes):
            for layer in layers_inside(node):
                self.record(graph_module, "kept", node, reason=f"{layer.name}: {layer.reason}")
            if annotation(node).role or not reads_weights(node):
                continue
            decided = self._decide(graph_module, node, sites)
            annotate(node, role=decided.role, reason=decided.reason, geometry=decided.geometry, chain=decided.chain)
            if decided.reason:
                self.record(graph_module, "kept", node, reason=decided.reason)
            if decided.geometry is not None:
                source = input_of(node)
                key = (source, replace(decided.geometry, out_channels=decided.geometry.groups))
                if key not in observers:
                    observers[key] = _insert_observer(graph_module, node, source, key[1])
                node.replace_input_with(source, observers[key])
            modified = True
        return PassResult(graph_module, modified)

    def _decide(self, graph_module: GraphModule, node: Node, sites: dict[nn.Module, list[Node]]) -> Annotation:
        reason = self._reason_to_keep(graph_module, node, sites)
        if reason is not None:
            return Annotation("keep", reason)
        module = module_of(node)
        assert module is not None
        geometry = LayerGeometry.of(module)
        wanted = self.recipe.chain(str(node.target))
        chain, declined = _kept_constraints(wanted or (), geometry)
        if chain:
            return Annotation("compress", "", geometry, chain)
        if not declined:
            declined = "dense in the recipe" if wanted is not None else "named by no entry of the recipe"
        return Annotation("reconstruct", declined, geometry) if self.reconstruct else Annotation("keep", declined)

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
        if changed := annotation(node).changed:
            return changed
        if len(sites[module]) > 1:
            return f"shared: called at {len(sites[module])} places with different inputs"
        if is_tied(graph_module, module.weight):
            return "its weight is shared with another part of the model"
        if module.weight.dtype not in (torch.float32, torch.float64):
            return f"its weight is {module.weight.dtype}; statistics need float32 or float64"
        columns = LayerGeometry.of(module).columns
        if columns > MAX_COLUMNS and self.observe:
            return f"{columns:,} inputs to an output: the Hessian alone would take {8 * columns**2 / 2**30:.1f} GiB"
        return None


def _kept_constraints(chain: Chain, geometry: LayerGeometry) -> tuple[Chain, str]:
    """The constraints that a layer can keep, and why it cannot keep the others.

    What follows a constraint that changes the layer's geometry is asked again when the layer is solved.
    """
    kept: list[Constraint] = []
    reasons = []
    for constraint in chain:
        reason = None if any(accepted.changes_geometry for accepted in kept) else constraint.decline(geometry)
        if reason is None:
            kept.append(constraint)
        else:
            reasons.append(reason)
    return tuple(kept), "; ".join(reasons)


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
