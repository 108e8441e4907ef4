"""Which functions and module classes a saved graph may name, and how a name becomes the object again.

A file that could name any function could run anything: ``torch.hub.load``, ``operator.attrgetter``. So the list is one
of mathematics on tensors, written down here, plus what the caller of `save` and `load` hands over.
"""

from __future__ import annotations

import builtins
import enum
import functools
import importlib
import inspect
import keyword
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

from fxprune.errors import CheckpointError

Allowed = Sequence[Callable[..., Any]]

# Packages whose module classes may be named. Their constructors are not run.
CLASS_ROOTS = ("torch.nn", "torch.ao.nn", "torchvision", "timm", "fxprune")
OP_NAMESPACES = ("aten", "torchvision")
_REACHES_FILES_OR_CALLS = frozenset({"from_file", "save", "load", "attrgetter", "itemgetter", "methodcaller", "call"})
_BUILTINS = ("abs", "bool", "divmod", "float", "getattr", "int", "len", "max", "min", "round", "sum")
# Private functions that torchvision's models hide from torch.fx: none of them does anything but compute.
_WRAPPED = {
    torchvision.models.swin_transformer: (
        "_get_relative_position_bias", "_patch_merging_pad", "shifted_window_attention"
    ),
    torchvision.models.video.swin_transformer: (
        "_get_window_and_shift_size", "_get_relative_position_bias", "_compute_pad_size_3d", "_compute_attention_mask_3d",
        "shifted_window_attention_3d",
    ),
    torchvision.models.video.mvit: ("_unsqueeze", "_squeeze", "_add_rel_pos", "_add_shortcut"),
}  # fmt: skip
# Methods of what leaf modules return beside tensors: tuples, lists, dicts.
_CONTAINER_METHODS = ("get", "items", "keys", "values", "index")


def is_identifier(name: object) -> bool:
    """Whether a name may stand in the Python code that torch.fx writes for a graph, public and no keyword."""
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def is_part_name(name: object) -> bool:
    """Whether a module, parameter or buffer may have this name in a saved file.

    That is every name that PyTorch allows, such as block1-0 or "global pool", but for those that could end a string in
    generated code.
    """
    return isinstance(name, str) and name.isprintable() and name != "" and not set(name) & set('."\\')


def is_module_path(name: object) -> bool:
    """Whether a name is a dotted path of such names, such as layer1.0.conv1."""
    return isinstance(name, str) and all(map(is_part_name, name.split(".")))


def is_method(name: object) -> bool:
    """Whether a name is a public method of tensors, or one that reads a dict, list or tuple."""
    known = is_identifier(name) and not str(name).startswith("_")
    return known and (hasattr(torch.Tensor, str(name)) or name in _CONTAINER_METHODS)


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Every function that a graph may call, by name."""
    variable = [name for name in dir(torch._C._VariableFunctions) if hasattr(torch, name)]
    found: dict[str, Callable[..., Any]] = {}
    for space, names in (
        (torch, (*variable, *torch.functional.__all__, "_assert")),
        (F, [n for n in dir(F) if getattr(getattr(F, n), "__module__", "") in ("torch.nn.functional", "torch._C._nn")]),
        (torch._C._nn, dir(torch._C._nn)),
        (torch.linalg, dir(torch.linalg)),
        (torch.fft, dir(torch.fft)),
        (torch.special, dir(torch.special)),
        (operator, operator.__all__),
        (math, dir(math)),
        (builtins, _BUILTINS),
        (torchvision.ops, torchvision.ops.__all__),
        *_WRAPPED.items(),
    ):
        for name in names:
            value = getattr(space, name, None)
            private = name.startswith("_") and name not in (*_WRAPPED.get(space, ()), "_assert")
            if private or name in _REACHES_FILES_OR_CALLS or (isinstance(value, type) and space is not builtins):
                continue
            if callable(value):
                found[f"{space.__name__}.{name}"] = value
    return found


@functools.cache
def _names() -> dict[int, str]:
    """Names by the function's id; the first name of a function that has several."""
    return {id(function): name for name, function in reversed(_functions().items())}


def function_name(function: Callable[..., Any], allow: Allowed) -> str:
    """The name to store for a function.

    Raises:
        CheckpointError: it is not on the list and not handed over.
    """
    if isinstance(function, OpOverload | OpOverloadPacket):
        name = f"torch.ops.{str(function).replace('::', '.')}"
        if _operator(name) is function:
            return name
    name = _names().get(id(function), "")
    if name:
        return name
    if any(function is other for other in allow):
        return _own_name(function)
    raise CheckpointError(
        f"{_own_name(function)} is not on the list of functions that a saved file may name. "
        "Pass allow=(that function,) to save and to load, or export the model to ONNX"
    )


def find_function(name: str, allow: Allowed) -> Callable[..., Any]:
    """The function of a stored name.

    Raises:
        CheckpointError: it is not on the list and not handed over, or this version of torch does not have it.
    """
    found = _operator(name) or _functions().get(name) or _handed_over(name, allow)
    if found is None:
        raise CheckpointError(
            f"the file calls {name!r}, which is not on the list of functions that a saved file may name, or not in "
            f"torch {torch.__version__}. If you trust the file, pass allow=(that function,)"
        )
    return found


def class_name(cls: type[nn.Module], allow: Allowed) -> str:
    """The name to store for a module class.

    Raises:
        CheckpointError: it is neither torch's, torchvision's, timm's or fxprune's own, nor handed over.
    """
    name = _own_name(cls)
    if _library_class(name) is cls or any(cls is other for other in allow):
        return name
    raise CheckpointError(
        f"it is of class {name}, which is neither torch's nor another library's that fxprune knows. "
        f"Pass allow=({cls.__name__},) to save and to load, or save its state_dict alone"
    )


def find_class(name: str, allow: Allowed) -> type[nn.Module]:
    """The module class of a stored name.

    Raises:
        CheckpointError: as `class_name`, or the library is not installed.
    """
    found = _handed_over(name, allow) or _library_class(name)
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise CheckpointError(
            f"the file holds a module of class {name!r}, which is neither a library's that fxprune knows nor handed "
            f"over. If you trust the file, pass allow=({name.rpartition('.')[2]},)"
        )
    return found


def enum_name(cls: type[enum.Enum], allow: Allowed) -> str:
    """The name to store for a class of named values.

    Raises:
        CheckpointError: as `class_name`.
    """
    name = _own_name(cls)
    if _library_class(name, enum.Enum) is cls or any(cls is other for other in allow):
        return name
    raise CheckpointError(
        f"values of {name} can be stored only if that class is handed over: pass allow=({cls.__name__},) to save and load"
    )


def find_enum(name: str, allow: Allowed) -> type[enum.Enum]:
    """The class of named values of a stored name.

    Raises:
        CheckpointError: as `find_class`.
    """
    found = _handed_over(name, allow) or _library_class(name, enum.Enum)
    if not inspect.isclass(found) or not issubclass(found, enum.Enum):
        raise CheckpointError(
            f"the file holds a value of {name!r}, which is neither a library's that fxprune knows nor handed over. "
            f"If you trust the file, pass allow=({name.rpartition('.')[2]},)"
        )
    return found


def _library_class(name: str, kind: type[Any] = nn.Module) -> type[Any] | None:
    root = next((root for root in CLASS_ROOTS if name.startswith(f"{root}.")), None)
    place, _, cls = name.rpartition(".")
    if root is None or not all(map(str.isidentifier, name.split("."))):
        return None
    try:
        found = getattr(importlib.import_module(place), cls, None)
    except ImportError:
        return None
    # Defined there and not merely imported there.
    own = inspect.isclass(found) and issubclass(found, kind) and _own_name(found) == name
    return found if own else None


def _operator(name: str) -> Callable[..., Any] | None:
    """torch.ops.aten.add.Tensor and the like."""
    parts = name.split(".")
    if parts[:2] != ["torch", "ops"] or len(parts) not in (4, 5) or parts[2] not in OP_NAMESPACES:
        return None
    if _REACHES_FILES_OR_CALLS.intersection(parts) or not all(map(str.isidentifier, parts)):
        return None
    found: Any = torch.ops
    for part in parts[2:]:
        found = getattr(found, part, None)
    return found if isinstance(found, OpOverload | OpOverloadPacket) else None


def _handed_over(name: str, allow: Iterable[Callable[..., Any]]) -> Any:
    return next((item for item in allow if _own_name(item) == name), None)


def _own_name(item: Callable[..., Any]) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', item)}"
