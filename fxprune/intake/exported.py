"""Graphs from torch.export: made here of a model that Python's tracers do not get through, or handed over by the user.

torch.export writes operators of the aten library on flat inputs and outputs. Here they become the functions and methods
of torch that a traced model calls, so that everything behind knows one vocabulary.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import inputs_of
from fxprune.errors import TraceError
from fxprune.graph.code_names import allow_any_name
from fxprune.runtime.quiet import quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten
_TRACED_FORM = "exported"
_IDENTITIES = (
    aten.lift_fresh_copy,
    aten.lift_fresh,
    aten.dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.alias,
)
_ASSERTIONS = (aten._assert_tensor_metadata, aten._assert_scalar, aten.sym_constrain_range_for_size, aten._assert_async)


def is_program(model: Any) -> TypeGuard[ExportedProgram]:
    """Whether a model is an ExportedProgram."""
    # Importing torch.export takes half a second; whoever has a program has imported it.
    return "torch.export" in sys.modules and isinstance(model, torch.export.ExportedProgram)


def is_exported(model: Any) -> TypeGuard[GraphModule]:
    """Whether a model is the module of an ExportedProgram."""
    return isinstance(model, GraphModule) and any(isinstance(n.target, OpOverload) for n in model.graph.nodes)


def is_in_traced_form(model: nn.Module) -> TypeGuard[GraphModule]:
    """Whether a model is what `as_traced` gives, or marked so."""
    return isinstance(model, GraphModule) and bool(model.meta.get(_TRACED_FORM))


def mark_as_traced(graph_module: GraphModule) -> None:
    """Let a graph be taken as it is, as what `as_traced` gives is."""
    graph_module.meta[_TRACED_FORM] = True


def module_of_program(program: ExportedProgram) -> GraphModule:
    """The graph of an ExportedProgram, free of side effects, under the names of the model that it was made of."""
    return as_traced(program.run_decompositions({}).module())


def export(model: nn.Module, batch: Any, device: torch.device) -> GraphModule:
    """Export a model on an example batch, open in the batch size, and bring the graph into a traced model's form.

    Args:
        model: in eval mode.
        batch: as a calibration loader gives it, of two images or more.
        device: where the model is.

    Raises:
        Exception: whatever torch.export raises.
    """
    from torch.export import Dim

    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in _inputs(model, batch).items()}
    shapes = {name: {0: Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None for name, x in inputs.items()}
    with torch.no_grad(), quiet():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    return module_of_program(program)


def as_traced(exported: GraphModule) -> GraphModule:
    """An exported graph in the form of a traced one: inputs by name, nested outputs, functions and methods of torch.

    Raises:
        TraceError: if the inputs are nested.
    """
    graph = Graph()
    output = graph.graph_copy(exported.graph, {}, return_output_node=False)
    output = _nested(exported, output)
    graph.output(output)
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "placeholder" and node is not first:
            first.prepend(node)
    for node in list(graph.nodes):
        _convert(node)
    for node in reversed(graph.nodes):
        stays = node.op in ("placeholder", "output") or node.users or str(node.target).endswith("_")
        if not stays and (node.op == "get_attr" or node.target is operator.getitem or _is_size(node)):
            graph.erase_node(node)
    traced = GraphModule(exported, allow_any_name(graph), "Exported")
    mark_as_traced(traced)
    for node in traced.graph.nodes:
        if node.op == "get_attr" and not hasattr(traced, str(node.target).split(".")[0]):
            raise TraceError(f"the exported graph reads {node.target!r}, which it does not hold")
    return traced


def drop_examples(graph_module: GraphModule) -> None:
    """Delete what torch.export noted at the nodes, example values among it, which cannot be copied."""
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        node.meta = {"nn_module_stack": stack} if stack else {}


def _inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The values of a batch by the names of forward's arguments."""
    graph = Graph()
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, p in inspect.signature(model.forward).parameters.items():
        if p.kind not in stars:
            graph.placeholder(name, default_value=p.default)
    nodes = graph.find_nodes(op="placeholder")
    return {str(n.target): x for n, x in inputs_of(batch, nodes).items() if not n.args or x is not n.args[0]}


def _nested(exported: GraphModule, output: Any) -> Any:
    codegen = exported.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return output
    info = codegen.pytree_info
    placeholders = exported.graph.find_nodes(op="placeholder")
    if info.in_spec.num_leaves != len(placeholders) or any(
        not child.is_leaf() for spec in info.in_spec.children() for child in spec.children()
    ):
        raise TraceError("the exported program takes nested inputs; export a model that takes tensors")
    return output if info.out_spec is None else pytree.tree_unflatten(list(output), info.out_spec)


def _convert(node: Node) -> None:
    """Put torch's own function or method into a node that calls an operator."""
    graph = node.graph
    if node.op == "call_module" and str(node.target).endswith("_guards_fn"):
        graph.erase_node(node)
        return
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return
    packet = node.target.overloadpacket
    if packet in _ASSERTIONS:
        graph.erase_node(node)
    elif packet in _IDENTITIES:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    elif packet is aten._native_batch_norm_legit_no_training:
        x, weight, bias, mean, variance, momentum, eps = node.args
        node.target = torch.batch_norm
        node.args = (x, weight, bias, mean, variance, False, momentum, eps, False)
        for user in list(node.users):
            user.replace_all_uses_with(node)
            graph.erase_node(user)
    elif packet is aten.sym_size:
        node.op, node.target = "call_method", "size"
    elif packet is aten.slice:
        given: tuple[Any, ...] = node.args
        x, dim, start, end, step = given + (0, None, None, 1)[len(given) - 1 :]
        end = None if isinstance(end, int) and end == torch.iinfo(torch.int64).max else end
        if isinstance(dim, int) and dim >= 0:
            node.target, node.args = operator.getitem, (x, (*[slice(None)] * dim, slice(start, end, step)))
    else:
        _call_by_name(node, packet.__name__)


def _call_by_name(node: Node, name: str) -> None:
    function: Callable[..., Any] | None = getattr(torch, name, None) or getattr(torch._C._nn, name, None)
    if name in ("view", "reshape", "expand", "permute", "repeat", "contiguous", "clone", "to") or function is None:
        if hasattr(Tensor, name) and node.args and isinstance(node.args[0], Node):
            node.op, node.target = "call_method", name
    elif callable(function):
        node.target = function


def _is_size(node: Node) -> bool:
    return node.op == "call_method" and node.target == "size"
