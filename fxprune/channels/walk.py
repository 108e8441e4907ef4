"""The walk over a traced graph that gives every tensor its channel layout."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Size, nn
from torch.fx import GraphModule, Node

from fxprune.channels.context import Context, Value, holds_tensor
from fxprune.channels.functions import function_rule
from fxprune.channels.layout import Channels, Layout
from fxprune.channels.modules import module_rule
from fxprune.graph import Shape, call_sites, has_hooks, module_of
from fxprune.operations import Argument, called_name, describe, operation_of
from fxprune.tracing import matches


def analyse_channels(
    graph_module: GraphModule, shapes: Mapping[Node, Shape], *, exclude: Sequence[str] = ()
) -> Channels:
    """Find out which channels are the same in different tensors, and which may change places.

    What is not known to treat channels alike fixes all channels that it reads: other operations and modules, modules
    called at several places, with hooks, with computed or shared parameters, or excluded. So does the model's output.

    Args:
        graph_module: a traced graph in eval mode.
        shapes: of every node's value, from `value_shapes`.
        exclude: module names or fnmatch patterns of modules whose parameters must stay as they are.
    """
    context = Context(shapes)
    sites = call_sites(graph_module)
    shared = _shared_parameters(graph_module)
    for node in graph_module.graph.nodes:
        value = _rule(context, node, sites, shared, exclude)
        if isinstance(value, str):
            for source in node.all_input_nodes:
                context.fix(context.values[source], value)
            value = context.fixed(shapes.get(node), value)
        context.values[node] = value
    for node in graph_module.graph.nodes:
        _need_what_is_counted(context, node)
    layouts = {node: value for node, value in context.values.items() if isinstance(value, Layout)}
    return context.relations.solve(layouts)


def _rule(
    context: Context,
    node: Node,
    sites: Mapping[nn.Module, Sequence[Node]],
    shared: set[int],
    exclude: Sequence[str],
) -> Value | str:
    if node.op == "placeholder":
        return f"they are the channels of the model's input {node.name!r}"
    if node.op == "get_attr":
        return f"they are read directly from {node.target!r}"
    if node.op == "output":
        return "they are the channels of the model's output"
    if not context.tensors(node):
        return f"{describe(node)} makes a tensor from no other"
    module = module_of(node)
    if module is None:
        operation = operation_of(node)
        if operation is not None and operation.is_metadata and not holds_tensor(context.shapes.get(node)):
            return None
        return function_rule(context, node)
    reason = _reason_to_fix(node, module, sites, shared, exclude)
    return reason or module_rule(context, node, module)


def _reason_to_fix(
    node: Node,
    module: nn.Module,
    sites: Mapping[nn.Module, Sequence[Node]],
    shared: set[int],
    exclude: Sequence[str],
) -> str | None:
    """Why a module's parameters cannot be permuted, whatever it computes."""
    if has_hooks(module):
        return f"{describe(node)} has forward hooks"
    if not [*module.parameters(), *module.buffers()]:
        return None
    if matches(str(node.target), exclude):
        return f"{describe(node)} is excluded"
    if len(sites[module]) > 1:
        return f"{describe(node)} is called at {len(sites[module])} places"
    if any(id(p) in shared for p in module.parameters()):
        return f"{describe(node)} shares a parameter with another part of the model"
    for name in ("weight", "bias"):
        if hasattr(module, name) and name not in module._parameters:
            return f"the {name} of {describe(node)} is computed"
    return None


def _need_what_is_counted(context: Context, node: Node) -> None:
    """Channels whose number the model computes with cannot go; only a reshape may read it, as `x.view(n, x.size(1), -1)` does.

    `x.shape[-2:]` says nothing of the channels, and may go anywhere.
    """
    operation = operation_of(node)
    if operation is None or not operation.is_metadata or holds_tensor(context.shapes.get(node)):
        return
    for source in context.tensors(node):
        layout, shape = context.values[source], context.shapes[source]
        if (
            not isinstance(layout, Layout)
            or not isinstance(shape, Size)
            or not _reads_dim(node, layout.dim, len(shape))
        ):
            continue
        for user in _computed_from(context, node, layout.dim, len(shape)):
            reached = operation_of(user)
            if reached is None or reached.channels != "reshape":
                context.relations.need(layout.classes, f"{describe(user)} is given the number of channels")


def _reads_dim(node: Node, dim: int, dims: int) -> bool:
    """Whether a node that asks something of a tensor of so many dimensions may learn the size of one of them."""
    if called_name(node) in ("dim", "ndimension", "is_floating_point", "get_device", "element_size"):
        return False
    if called_name(node) == "getattr" and node.args[1] in (
        "ndim",
        "dtype",
        "device",
        "layout",
        "is_cuda",
        "requires_grad",
    ):
        return False
    asked: Any = Argument(1, "dim").of(node) if called_name(node) == "size" else None
    if called_name(node) == "len":
        return dim == 0
    return asked is None or not isinstance(asked, int) or asked % dims == dim


def _computed_from(context: Context, node: Node, dim: int, dims: int) -> Iterator[Node]:
    """The nodes with a tensor for a value that are given what a node has learned of a dimension."""
    whole = node.target is getattr or (called_name(node) == "size" and Argument(1, "dim").of(node) is None)
    for user in node.users:
        if holds_tensor(context.shapes.get(user)) or user.op == "output":
            yield user
        elif not (whole and user.target is operator.getitem and dim not in _picked(user.args[1], dims)):
            yield from _computed_from(context, user, dim, dims)


def _picked(index: object, dims: int) -> range | tuple[int, ...]:
    """Which of so many dimensions an index picks; all where that is not written in the graph."""
    if isinstance(index, int):
        return (index % dims,)
    if isinstance(index, slice) and all(end is None or isinstance(end, int) for end in (index.start, index.stop)):
        return range(dims)[slice(index.start, index.stop)]
    return range(dims)


def _shared_parameters(graph_module: GraphModule) -> set[int]:
    """Ids of parameters that have several names, or are read by a get_attr node."""
    names: dict[int, list[str]] = {}
    for name, parameter in graph_module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    reads = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    return {key for key, of in names.items() if len(of) > 1 or not reads.isdisjoint(of)}
