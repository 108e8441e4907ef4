"""InsertObservers: decides each layer's role and constraints, and puts an observer before every layer to be solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.parametrize import is_parametrized

from fxprune.annotations import Annotation, annotate, annotation
from fxprune.calibration.observers import OBSERVERS
from fxprune.constraints import Constraint, keep_possible
from fxprune.constraints.mask import Mask
from fxprune.geometry import TRANSPOSED_CONVOLUTIONS, LayerGeometry, is_matrix_layer
from fxprune.graph import input_of, is_tied, module_of, without_input
from fxprune.layers.kept import layers_inside, matrices_read
from fxprune.layers.recurrent import Recurrent
from fxprune.layers.shared import Calls, not_one_problem, role_without_chain, weight_calls
from fxprune.operations import LAYERS, operation_of
from fxprune.passes.base import Pass
from fxprune.pattern import MixedPattern, NMPattern
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import matches

MAX_COLUMNS = 16_384  # A float64 Hessian of 2 GiB, of which solving needs several copies.
BLOCK_COLUMNS = 4_096  # Of a layer of more: few images tell so many columns apart, and time grows with their cube.
CONSTANT = "what it reads is the same for every batch, so that an export holds what it gives and not its weights"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class InsertObservers(Pass):
    """Annotates Conv and Linear calls with role and constraints, and inserts `HessianObserver` modules.

    Layers that read the same value in the same geometry share one observer, and so one Hessian. Calls that read the same weight
    have an observer of their own, one for all of them, and are one layer: the first has its role.

    Args:
        recipe: under which constraints each layer is solved.
        exclude: module names or fnmatch patterns of layers to leave exactly as they are.
        reconstruct: observe layers that stay dense, so that they can be re-fitted.
        observe: whether layers are solved from statistics, whose size sets a limit to their columns.
        max_columns: of a layer that is solved as a whole; one of more is solved in blocks of its input channels.
        block_columns: of a block, at most.

    Raises:
        PatternError: a name in the recipe matches no layer.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        exclude: Sequence[str] = (),
        reconstruct: bool = True,
        observe: bool = True,
        max_columns: int = MAX_COLUMNS,
        block_columns: int = BLOCK_COLUMNS,
    ) -> None:
        self.recipe = recipe
        self.exclude = tuple(exclude)
        self.reconstruct = reconstruct
        self.observe = observe
        self.max_columns = max_columns
        self.block_columns = block_columns

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        layers = [node for node in graph_module.graph.nodes if reads_weights(node)]
        kept = [node for node in graph_module.graph.nodes if isinstance(module_of(node), Recurrent)]
        names = [str(node.target) for node in layers if module_of(node) is not None]
        self.recipe.check([*names, *(row.name for node in kept for row in layers_inside(node))])
        calls = weight_calls(graph_module)
        constant = without_input(graph_module.graph)
        observers: dict[tuple[Node, LayerGeometry], Node] = {}
        modified = False
        for node in list(graph_module.graph.nodes):
            for layer in layers_inside(node):
                self.record(graph_module, "kept", node, reason=f"{layer.name}: {layer.reason}")
            if annotation(node).role or not reads_weights(node):
                continue
            decided = self._decide(graph_module, node, calls, constant)
            annotate(node, role=decided.role, reason=decided.reason, geometry=decided.geometry, chain=decided.chain)
            if decided.reason and decided.role in ("reconstruct", "keep"):
                self.record(graph_module, "kept", node, reason=decided.reason)
            if decided.geometry is not None and decided.role == "repeat":
                source = input_of(node)
                with graph_module.graph.inserting_before(node):
                    same = graph_module.graph.call_module(str(input_of(calls[node][0]).target), (source,))
                node.replace_input_with(source, same)
            elif decided.geometry is not None and len(calls[node]) > 1:
                source = input_of(node)
                node.replace_input_with(source, _insert_observer(graph_module, node, source, _seen(decided.geometry)))
            elif decided.geometry is not None:
                source = input_of(node)
                key = (source, _seen(decided.geometry))
                if key not in observers:
                    observers[key] = _insert_observer(graph_module, node, source, key[1])
                node.replace_input_with(source, observers[key])
            modified = True
        return PassResult(graph_module, modified)

    def _decide(self, graph_module: GraphModule, node: Node, calls: Calls, constant: set[Node]) -> Annotation:
        together = calls.get(node, (node,))
        first = annotation(together[0])
        if first.role and module_of(node) is module_of(together[0]):
            return Annotation("repeat", first.reason, first.geometry)
        if first.role and first.geometry is not None:  # Another module with that weight.
            return Annotation("repeat", f"its weight is that of {str(together[0].target)!r}", first.geometry)
        reason = self._reason_to_keep(graph_module, node, together)
        if reason is None and constant.issuperset(together):
            reason = CONSTANT
        if reason is not None:
            return Annotation("keep", reason)
        module = module_of(node)
        assert module is not None
        geometry = LayerGeometry.of(module)
        wanted = self.recipe.chain(str(node.target))
        narrowing = annotation(node).narrowing
        of_layer = [constraint for constraint in wanted or () if not constraint.is_of_graph]
        whole = _reason_to_stay_one(graph_module, together)
        chain, declined = keep_possible(of_layer, geometry, whole)
        fewer = narrowing is not None and narrowing.lost_inputs
        if narrowing is not None and not fewer and not declined and len(of_layer) < len(wanted or ()):
            declined = narrowing.reason or "its input channels are worth their MACs"
        if not chain and not declined and not fewer:
            declined = "dense in the recipe" if wanted is not None else "named by no entry of the recipe"
        if self.observe and geometry.columns > self.max_columns:
            in_blocks = geometry.in_blocks(self.block_columns, math.lcm(*map(_group, chain)))
            if in_blocks is None:
                uncut = f"its {geometry.columns:,} columns cannot be cut into equal blocks to be solved"
                return Annotation("keep", declined or uncut)
            geometry = in_blocks
            chain, more = keep_possible(chain, geometry, whole)
            declined = "; ".join(filter(None, (declined, more)))
        if chain:
            return Annotation("compress", "", geometry, chain)
        role = role_without_chain(calls, node, geometry, reconstruct=self.reconstruct)
        return Annotation(role, declined, None if role == "keep" else geometry)

    def _reason_to_keep(self, graph_module: GraphModule, node: Node, together: tuple[Node, ...]) -> str | None:
        """Why a layer's weights must not be touched at all, or None."""
        module = module_of(node)
        if module is None:
            return f"a functional call in {_place(node)}: its weight belongs to no nn.Conv2d or nn.Linear module"
        if matches(str(node.target), self.exclude):
            return "excluded"
        if is_parametrized(module):
            return "parametrized: its weight is computed; call torch.nn.utils.parametrize.remove_parametrizations first"
        if not is_matrix_layer(module):
            return f"{type(module).__name__} is not exactly a Conv1d, Conv2d, Conv3d, their transposed kind or Linear"
        if isinstance(module, TRANSPOSED_CONVOLUTIONS) and (len(node.args) > 1 or "output_size" in node.kwargs):
            return "a transposed convolution that is called with an output_size; give it an output_padding instead"
        computed = next((name for name in ("weight", "bias") if name not in module._parameters), None)
        if computed is not None:
            remedy = "call torch.nn.utils.remove_weight_norm, prune.remove or the like first"
            return f"its {computed} is computed by a hook; {remedy}"
        if changed := annotation(node).changed:
            return changed
        if (len(together) > 1 or is_tied(graph_module, module.weight)) and (
            shared := self._reason_to_keep_shared(graph_module, node, together)
        ):
            return shared
        if module.weight.dtype not in DTYPES:
            return f"its weight is {module.weight.dtype}; float16, bfloat16, float32 and float64 can be solved"
        return None

    def _reason_to_keep_shared(self, graph_module: GraphModule, node: Node, together: tuple[Node, ...]) -> str | None:
        """Why a weight that several calls read, or that has several names, must not be touched, or None."""
        if (reason := not_one_problem(graph_module, together)) is not None:
            return reason
        wanted = self.recipe.chain(str(node.target))
        for other in together:
            name = str(other.target)
            if matches(name, self.exclude):
                return f"its weight is shared with {name!r}, which is excluded"
            if annotation(other).changed:
                return f"its weight is shared with {name!r}: {annotation(other).changed}"
            if self.recipe.chain(name) != wanted:
                return f"its weight is shared with {name!r}, for which the recipe has another entry"
        return None


def _reason_to_stay_one(graph_module: GraphModule, calls: tuple[Node, ...]) -> str:
    """Why no two layers can take a layer's place, or ""."""
    if len(calls) > 1:
        return f"called at {len(calls)} places: two layers in place of one are put at one place only"
    owner = graph_module.get_submodule(str(calls[0].target).rpartition(".")[0])
    return "a recurrent layer has one matrix there, and no place for two" if isinstance(owner, Recurrent) else ""


def _seen(geometry: LayerGeometry) -> LayerGeometry:
    """What an observer has to know of a layer: layers that differ in their outputs alone share one."""
    return replace(geometry, out_channels=geometry.groups)


def _group(constraint: Constraint) -> int:
    """How many input channels a constraint takes together."""
    pattern = constraint.pattern if isinstance(constraint, Mask) else None
    levels = pattern.levels if isinstance(pattern, MixedPattern) else (pattern,)
    return math.lcm(*(level.m for level in levels if isinstance(level, NMPattern)))


def reads_weights(node: Node) -> bool:
    """Whether a node is a call of a Conv or Linear module, or a function or product with a parameter in its place."""
    if module_of(node) is not None:
        return isinstance(module_of(node), LAYERS)
    operation = operation_of(node)
    if operation is None or operation.weight is None:
        return False
    return operation.channels == "matrix" or operation.name in ("bilinear", "convolution") or bool(matrices_read(node))


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
