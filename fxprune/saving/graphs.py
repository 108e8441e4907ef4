"""The nodes of a torch.fx graph as JSON, and back.

torch.fx writes Python source from a graph and runs it, so every name in a file is checked before it gets there. Writing
makes the same check, so that a file that was written can be read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from fxprune.annotations import KEY, annotation
from fxprune.errors import CheckpointError
from fxprune.graph.code_names import AnyNameCodeGen, allow_any_name
from fxprune.saving.names import find_function, function_name, is_identifier, is_method, is_module_path
from fxprune.saving.values import Reader, Writer

# A traced forward's own annotations, which stand in the generated code; a string where its file postpones them.
_ANNOTATIONS = {"class": torch.Tensor, "torch.Tensor": "torch.Tensor", "Tensor": "Tensor"}


def encode_graph(graph_module: GraphModule, writer: Writer) -> list[dict[str, Any]]:
    """One dict a node; what other tools noted down, and type annotations other than Tensor, are left out.

    Raises:
        CheckpointError: a node calls or holds something that cannot be stored.
    """
    if type(graph_module.graph._codegen) not in (CodeGen, AnyNameCodeGen):
        raise CheckpointError(
            "the graph takes or gives nested inputs (torch.export made it); trace the original model to save it"
        )
    nodes = []
    for node in graph_module.graph.nodes:
        try:
            nodes.append(_encode_node(node, writer))
        except CheckpointError as error:
            raise CheckpointError(f"node {node.name!r} cannot be stored: {error}") from error
    return nodes


def _encode_node(node: Node, writer: Writer) -> dict[str, Any]:
    _check(node.name, node.op, node.target, node.args, node.kwargs)
    target = function_name(node.target, writer.allow) if callable(node.target) else node.target
    data: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    data["args"] = [writer.encode(argument) for argument in node.args]
    if node.kwargs:
        data["kwargs"] = {name: writer.encode(value) for name, value in node.kwargs.items()}
    if known := [name for name, kind in _ANNOTATIONS.items() if node.type == kind]:
        data["type"] = known[0]
    if KEY in node.meta:
        # Not the constraints: the layer has been solved, and they may be of a class that the reader does not know.
        data["meta"] = encode_meta({KEY: replace(annotation(node), chain=())}, writer)
    return data


def encode_meta(meta: dict[str, Any], writer: Writer) -> dict[str, Any]:
    """What fxprune's passes noted down."""
    return {key: writer.encode(value) for key, value in meta.items() if key == KEY}


def decode_graph(nodes: list[dict[str, Any]], reader: Reader) -> Graph:
    """The graph of `encode_graph`.

    Raises:
        CheckpointError: a node's name or target is none that `encode_graph` writes.
    """
    graph = Graph()
    for data in nodes:
        name, op, target = data["name"], data["op"], data["target"]
        args = tuple(reader.decode(argument) for argument in data["args"])
        kwargs = {key: reader.decode(value) for key, value in data.get("kwargs", {}).items()}
        found = find_function(target, reader.allow) if op == "call_function" else target
        _check(name, op, found, args, kwargs)
        annotation = _ANNOTATIONS.get(data.get("type", ""))
        node = graph.create_node(op, found, args, kwargs, name=name, type_expr=annotation)
        if node.name != name:
            raise CheckpointError(f"the file holds two nodes named {name!r}, or a name that torch.fx keeps for itself")
        node.meta.update({key: reader.decode(value) for key, value in data.get("meta", {}).items()})
        reader.nodes[name] = node
    return allow_any_name(graph)


def _check(name: str, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise CheckpointError for a node that a file may not hold."""
    good = {
        "placeholder": is_identifier(str(target).lstrip("*")),
        "get_attr": is_module_path(target),
        "call_module": is_module_path(target),
        "call_method": is_method(target),
        "call_function": target is not getattr or _reads_public_attribute(args),
        "output": target == "output",
    }
    if not good.get(op) or not is_identifier(name) or not all(map(is_identifier, kwargs)):
        what = {
            "call_method": "only public methods of tensors may be called",
            "call_function": "getattr may read public attributes only",
            "call_module": "a module's name may not hold \", \\ or unprintable characters; rename it in the model",
            "get_attr": "a weight's name may not hold \", \\ or unprintable characters; rename it in the model",
        }.get(op, "its name is none that torch.fx gives")
        raise CheckpointError(f"a saved file may not hold node {name!r} ({op} {target!r}): {what}")


def _reads_public_attribute(args: tuple[Any, ...]) -> bool:
    """Whether the arguments of getattr are a value and a name known now and public, such as shape."""
    return len(args) in (2, 3) and is_identifier(args[1]) and not args[1].startswith("_")
