"""A tree of modules as JSON, and back: class names, plain attributes, and where each weight is kept.

A module is made as unpickling makes it, without its constructor: attributes are what they were, whatever arguments led
to them. ``__getstate__`` and ``__setstate__`` run where a class has them; recurrent layers need both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.errors import CheckpointError
from fxprune.layers.zero_keeper import keeper_of
from fxprune.saving.names import class_name, find_class, is_identifier, is_part_name
from fxprune.saving.values import Reader, Writer

_INTERNAL = frozenset(nn.Module().__dict__)
_HOOKS = tuple(name for name in _INTERNAL if name.endswith("_hooks"))
_PARAMETRIZATIONS = "parametrizations"
# How the hooks of torch's own that compute a weight are taken off again.
_REMEDIES: dict[type[Any], str] = {
    WeightNorm: "remove_weight_norm(module)",
    SpectralNorm: "remove_spectral_norm(module)",
    prune.BasePruningMethod: 'prune.remove(module, "weight")',
}


@dataclass(frozen=True)
class ModuleWriter:
    """Writes modules; a weight or module that has several names is written once and referred to afterwards.

    Attributes:
        values: writes attributes.
        weights: parameters and buffers by their first full name.
    """

    values: Writer
    weights: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, root: nn.Module) -> dict[str, Any]:
        """The JSON form of a model's modules; of the root without class and attributes.

        Raises:
            CheckpointError: a class, a name or an attribute cannot be stored, or a module has hooks.
        """
        data = self._tree(root, "")
        # Attributes come second: they may be any of the modules and weights (`_flat_weights` of recurrent layers are).
        for path, module in root.named_modules():
            _refuse_hooks(module, path)
            if path:
                _at(data, root, path).update(self._class_and_attributes(module, path))
        return data

    def _tree(self, module: nn.Module, path: str) -> dict[str, Any]:
        if id(module) in self.values.modules:
            return {"same": self.values.modules[id(module)]}
        self.values.modules[id(module)] = path
        for name in (*module._parameters, *module._buffers, *module._modules):
            if not is_part_name(name):
                raise CheckpointError(
                    f"{path or 'the model'} has a part named {name!r}: a name in a saved file may not be empty nor hold "
                    '., ", \\ or unprintable characters; rename it in the model'
                )
        prefix = f"{path}." if path else ""
        return {
            "training": module.training,
            "parameters": {
                name: p if p is None else {"weight": self._weight(prefix + name, p), "requires_grad": p.requires_grad}
                for name, p in module._parameters.items()
            },
            "buffers": {
                name: b if b is None else {
                    "weight": self._weight(prefix + name, b),
                    "persistent": name not in module._non_persistent_buffers_set,
                }
                for name, b in module._buffers.items()
            },
            "modules": {
                name: child if child is None else self._tree(child, prefix + name)
                for name, child in module._modules.items()
            },
        }  # fmt: skip

    def _class_and_attributes(self, module: nn.Module, path: str) -> dict[str, Any]:
        attributes = {}
        for name, value in _state(module).items():
            if name in _INTERNAL:
                continue
            try:
                attributes[name] = self.values.encode(value)
            except CheckpointError as error:
                raise CheckpointError(
                    f"module {path!r} has an attribute {name!r}: {error}. If nothing reads it, delete it first"
                ) from error
            if not _is_attribute(name):
                raise CheckpointError(
                    f"module {path!r} has an attribute {name!r}, which is no attribute name; delete it"
                )
        try:
            cls = class_name(parametrize.type_before_parametrizations(module), self.values.allow)
        except CheckpointError as error:
            raise CheckpointError(f"module {path!r} cannot be stored: {error}") from error
        return {"class": cls, "attributes": attributes}

    def _weight(self, name: str, tensor: Tensor) -> str:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}, which no plain weights file holds; save the model before it is "
                "converted to such tensors"
            )
        first = self.values.weights.setdefault(id(tensor), name)
        if first == name:
            self.weights[name] = tensor.detach()
        return first


def _at(data: dict[str, Any], root: nn.Module, path: str) -> dict[str, Any]:
    """The JSON form of the module at a path."""
    for name in path.split("."):
        data = data["modules"][name]
    return data


def _state(module: nn.Module) -> Mapping[str, Any]:
    """What pickle would keep of a module."""
    own = getattr(type(module), "__getstate__", None)
    # Parametrized modules refuse to be pickled, by a __getstate__ that raises; Python 3.11 gives one to every object.
    if own is None or own is getattr(object, "__getstate__", None) or parametrize.is_parametrized(module):
        return module.__dict__
    state = own(module)
    return state if isinstance(state, Mapping) else module.__dict__


def _refuse_hooks(module: nn.Module, path: str) -> None:
    where = f"module {path!r}" if path else "the model"
    hooks = {name: _hooks(module, name) for name in _HOOKS}
    for cls, remedy in _REMEDIES.items():
        if any(isinstance(hook, cls) for found in hooks.values() for hook in found):
            raise CheckpointError(
                f"{where} has a weight that a hook of torch's computes ({cls.__name__}), which cannot be stored; make it a "
                f"plain one before saving, or better before compiling: torch.nn.utils.{remedy}"
            )
    if names := [name for name, found in hooks.items() if found]:
        raise CheckpointError(f"{where} has {', '.join(names)}, which cannot be stored; remove them first")


def _hooks(module: nn.Module, name: str) -> list[Any]:
    """A module's hooks of one kind that something would be lost without.

    Torch's parametrizations read weights of older versions with theirs, and those of `keep_zeros` have written the zeros.
    """
    found = [getattr(hook, "hook", hook) for hook in (getattr(module, name) or {}).values()]
    return [
        hook
        for hook in found
        if getattr(hook, "__module__", "") != "torch.nn.utils.parametrizations" and keeper_of(hook) is None
    ]


@dataclass(frozen=True)
class ModuleReader:
    """Makes modules again.

    Attributes:
        values: reads attributes.
        weights: what `ModuleWriter` collected.
    """

    values: Reader
    weights: dict[str, Tensor]

    def decode(self, data: dict[str, Any]) -> nn.Module:
        """The modules of a JSON form."""
        root = self._tree(data, "")
        for path, module in root.named_modules():
            if path:
                self._set_attributes(module, _at(data, root, path))
        return root

    def _tree(self, data: dict[str, Any], path: str) -> nn.Module:
        if "same" in data:
            return self.values.modules[data["same"]]
        cls = find_class(data["class"], self.values.allow) if path else nn.Module
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        self.values.modules[path] = module
        prefix = f"{path}." if path else ""
        buffers = data["buffers"]
        # Not by __setattr__, which a class may have made its own.
        module.__dict__.update(
            training=bool(data["training"]),
            _parameters={_part(name): self._parameter(spec) for name, spec in data["parameters"].items()},
            _buffers={_part(name): spec and self._tensor(spec["weight"]) for name, spec in buffers.items()},
            _non_persistent_buffers_set={name for name, spec in buffers.items() if spec and not spec["persistent"]},
            _modules={
                _part(name): None if child is None else self._tree(child, prefix + name)
                for name, child in data["modules"].items()
            },
        )
        return module

    def _set_attributes(self, module: nn.Module, data: dict[str, Any]) -> None:
        state = dict(module.__dict__)
        for name, value in data["attributes"].items():
            if not _is_attribute(name):
                raise CheckpointError(f"the file sets an attribute {name!r}, which no saved module has")
            state[name] = self.values.decode(value)
        module.__setstate__(state)
        if parametrize.is_parametrized(module):
            _compute_weights(module)

    def _parameter(self, spec: dict[str, Any] | None) -> nn.Parameter | None:
        if spec is None:
            return None
        made, name = self.values.weights, spec["weight"]
        if not isinstance(made.get(name), nn.Parameter):
            made[name] = nn.Parameter(self.weights[name], requires_grad=bool(spec["requires_grad"]))
        parameter = made[name]
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def _tensor(self, name: str) -> Tensor:
        return self.values.weights.setdefault(name, self.weights[name])


def _compute_weights(module: nn.Module) -> None:
    """Give a module whose parametrizations are in place the properties that compute its weights from them."""
    names = list(module.get_submodule(_PARAMETRIZATIONS)._modules)
    for name in names:
        if not is_identifier(name):
            raise CheckpointError(f"the file computes a weight named {name!r}, which no saved module has")
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)


def _is_attribute(name: str) -> bool:
    return isinstance(name, str) and not name.startswith("__") and name not in _INTERNAL


def _part(name: str) -> str:
    if not is_part_name(name):
        raise CheckpointError(f"the file holds a weight or module named {name!r}, which no saved module has")
    return name
