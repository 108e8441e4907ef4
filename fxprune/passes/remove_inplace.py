"""RemoveInplace: makes a graph free of side effects, so that any stored value may be used twice.

Eager execution overwrites x at `y = x.relu_()`, and whatever reads x later sees y. Here the operation is made
out-of-place, and those later reads become reads of y. Tensors that share memory with x are followed: one that
is x itself (dropout in eval mode) is treated like x; a later read through a view of x is an error.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import annotation
from fxprune.errors import GraphError
from fxprune.graph import module_of
from fxprune.operations import (
    AUGMENTED,
    AUGMENTED_METHODS,
    called_name,
    has_in_place_name,
    inplace_argument,
    is_augmented,
    memory_of,
    operation_of,
)
from fxprune.passes.base import Pass
from fxprune.passes.shared_memory import REMEDY, SharedMemory, is_number


class RemoveInplace(Pass):
    """Replaces in-place operations by out-of-place ones, and keeps the values that eager execution computes.

    1. Modules and functions with `inplace=True` get `inplace=False`; a Tensor method or torch function whose
       name ends in one underscore becomes the one without; `operator.iadd` becomes `operator.add`, and so
       on.
    2. Reads of the overwritten value that come later in the graph become reads of the result. (A number or a
       tuple under `+=` is not overwritten, only its name is bound anew.)
    3. A leaf module with in-place modules inside is kept as it is, and recorded.

    Not seen: what a leaf module or a wrapped function does to its inputs inside, and an in-place operator
    whose right operand has the wider dtype (in place, the result is rounded to the left operand's).

    Raises:
        GraphError: for item assignment, `out=`, an operation with no out-of-place form, a write into a
            parameter or buffer, and a write into memory that is read later through another view, or by a module that
            hooks change.

    Example:
        >>> activation = nn.Sequential(nn.Hardswish(inplace=True), nn.Identity())
        >>> graph_module = torch.fx.symbolic_trace(activation)
        >>> RemoveInplace()(graph_module).modified
        True
        >>> graph_module.get_submodule("0").inplace
        False
    """

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        memory = SharedMemory(graph_module)
        inplace_modules: set[nn.Module] = set()
        modified = False
        for node in graph_module.graph.nodes:
            module = module_of(node)
            overwritten = _overwritten(node)
            if module is not None and getattr(module, "inplace", False) is True:
                inplace_modules.add(module)
                rewritten = True
            else:
                rewritten = _set_inplace_false(node) or _replace_target(node)
            if rewritten:
                readers = memory.redirect_later_reads(overwritten, node) if overwritten is not None else []
                if readers and annotation(node).changed:
                    raise GraphError(
                        f"node {node.name!r} overwrites {overwritten}, which {', '.join(readers)} read later, and a hook gives "
                        "something else as its value; remove the hook, or make the module with inplace=False"
                    )
                told = f"; {', '.join(readers)} read its result in place of {overwritten}" if readers else ""
                self.record(graph_module, "replaced", node, reason=f"it worked in place{told}")
                modified = True
            memory.add(node)
            if module is not None:
                self._record_inner(graph_module, node, module)
        for module in inplace_modules:
            setattr(module, "inplace", False)  # noqa: B010 - nn.Module declares no such attribute
        return PassResult(graph_module, modified)

    def _record_inner(self, graph_module: GraphModule, node: Node, module: nn.Module) -> None:
        inner = [n for n, m in module.named_modules() if n and getattr(m, "inplace", False) is True]
        if inner:
            reason = f"a leaf module; {', '.join(inner)} inside it work in place and may overwrite its input"
            self.record(graph_module, "kept", node, reason=reason)


def _overwritten(node: Node) -> Node | None:
    """The tensor that a node would overwrite if it works in place: its first input."""
    if not node.all_input_nodes or node.target is operator.imatmul:  # Tensors have no in-place matmul.
        return None
    first = node.args[0] if node.args else node.all_input_nodes[0]
    if not isinstance(first, Node) or is_number(first) or memory_of(first) == "views":
        return None  # `+=` leaves numbers and tuples alone and gives new ones.
    return first


def _set_inplace_false(node: Node) -> bool:
    """Turn a function's inplace=True, given by keyword or by position, to False."""
    given = inplace_argument(node)
    if isinstance(given, str):
        node.update_kwarg(given, False)
    elif given is not None:
        node.update_arg(given, False)
    return given is not None


def _replace_target(node: Node) -> bool:
    """Put the out-of-place namesake of an in-place function or method into a node."""
    if node.op not in ("call_method", "call_function"):
        return False
    target: Any = node.target
    name = called_name(node)
    is_item_assignment = name == "__setitem__" or target is operator.setitem
    is_mutable = isinstance(target, OpOverload) and target._schema.is_mutable
    if is_item_assignment or is_mutable or node.kwargs.get("out") is not None:
        what = "assigns to an item of" if is_item_assignment else "writes into"
        raise GraphError(f"node {node.name!r} ({name}) {what} an existing tensor. {REMEDY}")
    if is_augmented(node):
        node.target = AUGMENTED_METHODS[target] if node.op == "call_method" else AUGMENTED[target]
        return True
    if not has_in_place_name(node):
        return False
    if node.op == "call_method":
        home: Any = torch.Tensor
    else:
        home = next((home for home in (torch, F) if getattr(home, name, None) == target), None)
    namesake = getattr(home, name[:-1], None)
    operation = operation_of(node)
    if not callable(namesake) or (operation is not None and not operation.out_of_place):
        raise GraphError(f"node {node.name!r} ({name}) works in place, with no out-of-place form. {REMEDY}")
    node.target = name[:-1] if node.op == "call_method" else namesake
    return True
