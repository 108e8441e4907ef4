"""Arguments, attributes and reports as JSON, and back.

Numbers, strings, None and lists are themselves; everything else is a dict with one key that says what it is.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.errors import CheckpointError
from fxprune.saving.names import (
    Allowed,
    class_name,
    enum_name,
    find_class,
    find_enum,
    find_function,
    function_name,
)

# torch's own constants, which are stored by name.
_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)
_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "size": torch.Size, "set": set, "frozenset": frozenset}


@dataclass(frozen=True)
class Writer:
    """Turns values into JSON; tensors among them are put aside under numbered names.

    Attributes:
        allow: functions and classes that may be named beyond those on the list.
        tensors: the tensors put aside.
        weights: names of the model's own parameters and buffers, by id; an attribute that is one of them stays so.
        modules: paths of the model's modules, by id; likewise.
    """

    allow: Allowed = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    modules: dict[int, str] = field(default_factory=dict)
    _numbered: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def encode(self, value: Any) -> Any:
        """The JSON form of a value.

        Raises:
            CheckpointError: values of its type cannot be stored.
        """
        if isinstance(value, enum.Enum) and value.name in type(value).__members__:
            return {"enum": enum_name(type(value), self.allow), "name": value.name}
        if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
            return value
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, Node):
            return {"node": value.name}
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            if id(value) not in self.modules:
                raise CheckpointError(
                    f"it holds a {type(value).__name__}, which is no registered part of the model; "
                    "register it (as an attribute of its own, or in an nn.ModuleList) before compiling"
                )
            return {"module": self.modules[id(value)]}
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        for kind, cls in _SEQUENCES.items():
            if type(value) is cls:
                return {kind: [self.encode(item) for item in value]}
        if isinstance(value, Mapping):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.encode(item) for item in (value.start, value.stop, value.step)]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if value is Ellipsis:
            return {"ellipsis": True}
        if isinstance(value, functools.partial):
            return {
                "partial": self.encode(value.func),
                "args": [self.encode(item) for item in value.args],
                "kwargs": [[name, self.encode(item)] for name, item in value.keywords.items()],
            }
        if isinstance(value, _CONSTANTS):
            return {"constant": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if dataclasses.is_dataclass(type(value)) and type(value).__module__.split(".")[0] == "fxprune":
            fields = {f.name: self.encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"record": f"{type(value).__module__}.{type(value).__qualname__}", "fields": fields}
        if inspect.isclass(value) and issubclass(value, nn.Module):
            return {"class": class_name(value, self.allow)}
        if callable(value) and hasattr(value, "__name__"):
            return {"function": function_name(value, self.allow)}
        raise CheckpointError(f"values of type {type(value).__module__}.{type(value).__qualname__} cannot be stored")

    def _tensor(self, tensor: Tensor) -> dict[str, str]:
        if id(tensor) in self.weights:
            return {"weight": self.weights[id(tensor)]}
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise CheckpointError(f"it is a {type(tensor).__name__}, which no plain weights file holds")
        # The tensor is kept beside its number, so that no later one has its id.
        name, _ = self._numbered.setdefault(id(tensor), (str(len(self.tensors)), tensor))
        self.tensors[name] = tensor.detach()
        return {"tensor": name}


@dataclass(frozen=True)
class Reader:
    """Turns JSON into values again.

    Attributes:
        allow: functions and classes that may be named beyond those on the list.
        tensors: what `Writer` put aside.
        nodes: the nodes of the graph made so far, by name.
        weights: the model's parameters and buffers made so far, by name.
        modules: its modules made so far, by path.
    """

    allow: Allowed
    tensors: Mapping[str, Tensor]
    nodes: dict[str, Node] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def decode(self, data: Any) -> Any:
        """The value of a JSON form.

        Raises:
            CheckpointError: it names something that may not be looked up.
            KeyError, TypeError, ValueError, AttributeError: it is damaged.
        """
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        kind, content = next(iter(data.items()))
        if kind == "node":
            return self.nodes[content]
        if kind == "tensor":
            return self.tensors[content]
        if kind == "weight":
            return self.weights[content]
        if kind == "module":
            return self.modules[content]
        if kind == "complex":
            return complex(*content)
        if kind == "enum":
            return find_enum(content, self.allow)[data["name"]]
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](self.decode(item) for item in content)
        if kind == "range":
            return range(*content)
        if kind == "partial":
            given = {name: self.decode(item) for name, item in data["kwargs"]}
            return functools.partial(self.decode(content), *map(self.decode, data["args"]), **given)
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        if kind == "slice":
            return slice(*(self.decode(item) for item in content))
        if kind == "ellipsis":
            return Ellipsis
        if kind == "constant":
            return _constant(content)
        if kind == "device":
            return torch.device(content)
        if kind == "record":
            return _record(content)(**{name: self.decode(item) for name, item in data["fields"].items()})
        if kind == "class":
            return find_class(content, self.allow)
        if kind == "function":
            return find_function(content, self.allow)
        raise ValueError(f"unknown kind of value {kind!r}")


def _constant(name: str) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, _CONSTANTS):
        raise ValueError(f"torch.{name} is no dtype, layout or memory format")
    return found


def _record(name: str) -> type[Any]:
    """A dataclass of fxprune's own, by name."""
    place, _, cls = name.rpartition(".")
    if place.split(".")[0] != "fxprune":
        raise CheckpointError(f"the file names {name!r} where a record of fxprune's own is expected")
    try:
        found = getattr(importlib.import_module(place), cls, None)
    except ImportError:
        found = None
    if not inspect.isclass(found) or not dataclasses.is_dataclass(found) or found.__module__ != place:
        raise CheckpointError(f"this version of fxprune has no record {name!r}; the file is from another version")
    return found
