"""Weights that a module computes from others at every call, though in eval mode they never change: computed once.

Parametrizations (weight_norm, spectral_norm, orthogonal and the user's own), and the hooks of torch's older weight_norm and
spectral_norm and of torch.nn.utils.prune.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.intake.names import matches
from fxprune.intake.origins import Origin

_SUFFIXES = {WeightNorm: ("_g", "_v"), SpectralNorm: ("_orig", "_u", "_v"), BasePruningMethod: ("_orig", "_mask")}


def are_there(model: nn.Module, exclude: Sequence[str] = ()) -> bool:
    """Whether a model has computed weights, other than in excluded modules."""
    return any(parametrize.is_parametrized(m) or any(_hooks(m)) for _, m in _modules(model, exclude))


@torch.no_grad()
def compute(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Origin]:
    """Replace computed weights by their values, in place.

    Args:
        model: in eval mode.
        exclude: module names or fnmatch patterns of modules to leave as they are.

    Returns:
        The origin of each weight that was computed.
    """
    found: dict[str, Origin] = {}
    for path, module in _modules(model, exclude):
        prefix = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            found |= _settle(module, prefix)
        for key, hook, suffixes in list(_hooks(module)):
            name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            found[prefix + name] = Origin(tuple(f"{prefix}{name}{suffix}" for suffix in suffixes), "computed")
            hook.remove(module)
            del module._forward_pre_hooks[key]
    return found


def _settle(module: Any, prefix: str) -> dict[str, Origin]:
    """Take the parametrizations off a module.

    torch's `remove_parametrizations` changes the class, which the user's own model shares with its copies.
    """
    chains = dict(module.parametrizations.items())
    values = {name: getattr(module, name).detach().clone() for name in chains}
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    found = {}
    for name, chain in chains.items():
        trained = any(p.requires_grad for p in chain.parameters())
        is_parameter = any(True for _ in chain.parameters())
        setattr(module, name, nn.Parameter(values[name], trained) if is_parameter else nn.Buffer(values[name]))
        sources = tuple(f"{prefix}parametrizations.{name}.{key}" for key in chain.state_dict())
        found[prefix + name] = Origin(sources, "computed")
    return found


def _modules(model: nn.Module, exclude: Sequence[str]) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if not matches(path, exclude)]


def _hooks(module: nn.Module) -> Iterator[tuple[int, Any, tuple[str, ...]]]:
    """The hooks that compute a weight, with what they append to its name."""
    for key, hook in module._forward_pre_hooks.items():
        for kind, suffixes in _SUFFIXES.items():
            if isinstance(hook, kind):
                yield key, hook, suffixes
