"""What a torch.fx node does, as a name and arguments that can be compared with another node's."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxprune.graph import module_of

_COMMA = re.compile(r",\s*(?![^()\[\]{}]*[)\]}])")  # not inside brackets
_LEFT_OUT = ("inplace", "bias", "in_features", "out_features")


def operation_name(node: Node) -> str:
    """Module class, function or method; relu_ and iadd are called relu and add."""
    module = module_of(node)
    if module is not None:
        return type(module).__name__
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    name = _function_name(node)
    return name[1:] if _is_augmented(name) else name


def is_inplace(node: Node) -> bool:
    """Whether a node overwrites its input."""
    module = module_of(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    written = name.endswith("_") and not name.endswith("__")
    return written or _is_augmented(_function_name(node)) or _function_arguments(node).get("inplace") == "True"


def operation_arguments(node: Node) -> dict[str, str]:
    """Everything that a node is called with beside tensors, by name, as text.

    Left out: `inplace`, which does not change the values; `bias`, which is compared as a tensor; sizes of weights.
    """
    module = module_of(node)
    arguments = _function_arguments(node) if module is None else _module_arguments(module)
    return {name: text for name, text in arguments.items() if name not in _LEFT_OUT}


def read_nodes(node: Node) -> list[Node]:
    """The nodes that a node reads, in order of the arguments; one that is read twice comes twice."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _function_name(node: Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet)).strip("_")


def _is_augmented(name: str) -> bool:
    """Whether a name is iadd, isub, ...: += and its kin, stripped of underscores."""
    return name[:1] == "i" and hasattr(torch.Tensor, f"__{name}__") and hasattr(torch.Tensor, f"__{name[1:]}__")


def _function_arguments(node: Node) -> dict[str, str]:
    """Arguments of a function or method by name, with a dot for every node in them."""
    if node.op not in ("call_function", "call_method"):
        return {}
    try:
        names = list(inspect.signature(node.target).parameters) if callable(node.target) else []
    except ValueError:  # a built-in function without a signature
        names = []
    texts = {}
    for position, value in enumerate(node.args):
        texts[names[position] if position < len(names) else f"argument {position}"] = _text(value)
    texts |= {name: _text(value) for name, value in node.kwargs.items()}
    return {name: text for name, text in texts.items() if text != "·"}


def _text(value: Any) -> str:
    """The value as text, with a dot for every node in it."""
    if isinstance(value, Node):
        return "·"
    if isinstance(value, (list, tuple)):
        opening, closing = "[]" if isinstance(value, list) else "()"
        return opening + ", ".join(map(_text, value)) + closing
    if isinstance(value, slice):
        return ":".join("" if part is None else _text(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def _module_arguments(module: nn.Module) -> dict[str, str]:
    """What a module prints about itself, by name; sizes of its parameters are left out."""
    texts: dict[str, str] = {}
    for position, item in enumerate(_COMMA.split(module.extra_repr())):
        name, named, value = item.partition("=")
        if named:
            texts[name.strip()] = value.strip()
        elif item.strip() and not module._parameters:
            texts[f"argument {position}"] = item.strip()
    return texts
