"""Arguments, attributes and reports as JSON, and back.

Numbers, strings, None and lists are themselves; everything else is a dict with one key that says what it is.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.errors import CheckpointError
from fxprune.saving.names import Allowed, class_name, find_class, find_function, function_name

# torch's own constants, which are stored by name.
_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout)


@dataclass(frozen=True)
class Writer:
    """Turns values into JSON; tensors among them are put aside under numbered names.

    Attributes:
        allow: functions and classes that may be named beyond those on the list.
        tensors: the tensors put aside.
    """

    allow: Allowed = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, value: Any) -> Any:
        """The JSON form of a value.

        Raises:
            CheckpointError: values of its type cannot be stored.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Node):
            return {"node": value.name}
        if isinstance(value, Tensor):
            name = str(len(self.tensors))
            self.tensors[name] = value.detach()
            return {"tensor": name}
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if type(value) is tuple or isinstance(value, torch.Size):
            return {"tuple": [self.encode(item) for item in value]}
        if isinstance(value, Mapping):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.encode(item) for item in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": True}
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


@dataclass(frozen=True)
class Reader:
    """Turns JSON into values again.

    Attributes:
        allow: functions and classes that may be named beyond those on the list.
        tensors: what `Writer` put aside.
        nodes: the nodes of the graph made so far, by name.
    """

    allow: Allowed
    tensors: Mapping[str, Tensor]
    nodes: dict[str, Node] = field(default_factory=dict)

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
        if kind == "tuple":
            return tuple(self.decode(item) for item in content)
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
