"""A tree of modules as JSON, and back: class names, plain attributes, and where each weight is kept.

A module is made as unpickling makes it, without its constructor: attributes are what they were, whatever arguments led
to them. ``__setstate__`` runs, with which torch's classes bring the attributes of older versions up to date.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxprune.errors import CheckpointError
from fxprune.saving.names import class_name, find_class, is_identifier, is_module_path
from fxprune.saving.values import Reader, Writer

_INTERNAL = frozenset(nn.Module().__dict__)
_HOOKS = tuple(name for name in _INTERNAL if name.endswith("_hooks"))


@dataclass(frozen=True)
class ModuleWriter:
    """Writes modules; a weight or module that has several names is written once and referred to afterwards.

    Attributes:
        values: writes attributes.
        weights: parameters and buffers by their first full name.
    """

    values: Writer
    weights: dict[str, Tensor] = field(default_factory=dict)
    _modules: dict[int, str] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)

    def encode(self, module: nn.Module, path: str = "") -> dict[str, Any]:
        """The JSON form of a module and all inside it; of the root (path "") without class and attributes.

        Raises:
            CheckpointError: a class or attribute cannot be stored, or a module has hooks.
        """
        if id(module) in self._modules:
            return {"same": self._modules[id(module)]}
        self._modules[id(module)] = path
        prefix = f"{path}." if path else ""
        data: dict[str, Any] = {"training": module.training}
        if path:
            data |= self._class_and_attributes(module, path)
        data["parameters"] = {
            name: None if p is None else {"weight": self._weight(prefix + name, p), "requires_grad": p.requires_grad}
            for name, p in module._parameters.items()
        }
        data["buffers"] = {
            name: None if b is None else {
                "weight": self._weight(prefix + name, b),
                "persistent": name not in module._non_persistent_buffers_set,
            }
            for name, b in module._buffers.items()
        }  # fmt: skip
        data["modules"] = {
            name: None if child is None else self.encode(child, prefix + name)
            for name, child in module._modules.items()
        }
        return data

    def _class_and_attributes(self, module: nn.Module, path: str) -> dict[str, Any]:
        if hooks := [name for name in _HOOKS if getattr(module, name)]:
            raise CheckpointError(f"module {path!r} has {', '.join(hooks)}, which cannot be stored; remove them first")
        attributes = {}
        for name, value in module.__dict__.items():
            if name in _INTERNAL:
                continue
            try:
                attributes[name] = self.values.encode(value)
            except CheckpointError as error:
                raise CheckpointError(f"module {path!r} has an attribute {name!r}: {error}") from error
        try:
            return {"class": class_name(type(module), self.values.allow), "attributes": attributes}
        except CheckpointError as error:
            raise CheckpointError(f"module {path!r} cannot be stored: {error}") from error

    def _weight(self, name: str, tensor: Tensor) -> str:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}, which no plain weights file holds; save the model before it is "
                "converted to such tensors"
            )
        first = self._names.setdefault(id(tensor), name)
        if first == name:
            self.weights[name] = tensor.detach()
        return first


@dataclass(frozen=True)
class ModuleReader:
    """Makes modules again.

    Attributes:
        values: reads attributes.
        weights: what `ModuleWriter` collected.
    """

    values: Reader
    weights: dict[str, Tensor]
    _modules: dict[str, nn.Module] = field(default_factory=dict)
    _made: dict[str, Tensor] = field(default_factory=dict)

    def decode(self, data: dict[str, Any], path: str = "") -> nn.Module:
        """The module of a JSON form."""
        if "same" in data:
            return self._modules[data["same"]]
        cls = find_class(data["class"], self.values.allow) if path else nn.Module
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        self._modules[path] = module
        prefix = f"{path}." if path else ""
        state = {_attribute(name): self.values.decode(value) for name, value in data.get("attributes", {}).items()}
        buffers = data["buffers"]
        state |= {
            "training": bool(data["training"]),
            "_parameters": {_part(name): self._parameter(spec) for name, spec in data["parameters"].items()},
            "_buffers": {_part(name): spec and self._tensor(spec["weight"]) for name, spec in buffers.items()},
            "_non_persistent_buffers_set": {name for name, spec in buffers.items() if spec and not spec["persistent"]},
            "_modules": {
                _part(name): None if child is None else self.decode(child, prefix + name)
                for name, child in data["modules"].items()
            },
        }
        module.__setstate__(state)
        return module

    def _parameter(self, spec: dict[str, Any] | None) -> nn.Parameter | None:
        if spec is None:
            return None
        name = spec["weight"]
        if name not in self._made:
            self._made[name] = nn.Parameter(self.weights[name], requires_grad=bool(spec["requires_grad"]))
        made = self._made[name]
        assert isinstance(made, nn.Parameter)
        return made

    def _tensor(self, name: str) -> Tensor:
        return self._made.setdefault(name, self.weights[name])


def _attribute(name: str) -> str:
    if not is_identifier(name) or name.startswith("__") or name in _INTERNAL:
        raise CheckpointError(f"the file sets an attribute {name!r}, which no saved module has")
    return name


def _part(name: str) -> str:
    if not is_module_path(name) or "." in name:
        raise CheckpointError(f"the file holds a weight or module named {name!r}, which no saved module has")
    return name
