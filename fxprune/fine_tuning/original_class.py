"""state_dict_for(): the weights of a compiled model in the form that its original class loads.

Compiling folds BatchNorm away, so the class has parameters that the compiled model lacks. In eval mode BatchNorm is a factor
s = γ / √(σ² + ε) and a shift, and whatever γ, μ and σ² are, W and β can be chosen such that

    γ (W x + b − μ) / √(σ² + ε) + β  =  Ŵ x + b̂   for   W = Ŵ / s,   β = b̂ + s (μ − b),

zeros included. So the class keeps the statistics that it has, in the channel order of the compiled model, and can be trained
on in train mode as the dense model could.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from fxprune.annotations import changes, report_of
from fxprune.channels.apply import channel_order
from fxprune.errors import CheckpointError, TraceError
from fxprune.graph import module_of
from fxprune.graph.model_argument import not_a_model
from fxprune.intake.origins import origins
from fxprune.operations import LAYERS
from fxprune.tracing import trace

_NO_FACTOR = 1e-12  # A smaller factor of BatchNorm's is none to divide by.


def state_dict_for(compiled: nn.Module, model: nn.Module) -> dict[str, Any]:
    """A state dict with which a model of the original class computes what the compiled one does.

    BatchNorm that was folded away keeps the statistics and factors of `model`, and the layer in front of it gets weights to
    match; zeros stay zeros. To train on in train mode, give the dense model or another one with its statistics; in eval mode
    any instance of the class will do. Parts of the class that the compiled model does not have, since no output depends on
    them, stay as they are in `model`.

    Args:
        compiled: what `fxprune.compile` or `fxprune.load` returned.
        model: an instance of the class that was compiled; not modified.

    Returns:
        Every entry of `model.state_dict()`, for `load_state_dict`; tensors are copies, on the CPU.

    Raises:
        CheckpointError: the class cannot hold the compiled weights; names the layer, the reason and the remedy.

    Example:
        >>> import fxprune
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> images = torch.randn(32, 4, 8, 8)
        >>> compiled = fxprune.compile(model, images.split(16), progress=False)
        >>> again = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> again.load_state_dict(fxprune.state_dict_for(compiled, again))
        <All keys matched successfully>
        >>> torch.allclose(again(images), compiled(images), atol=1e-5)
        True
        >>> float((again[0].weight == 0).float().mean())
        0.5
    """
    inside = _compiled_inside(compiled)
    if not inside or not isinstance(model, nn.Module):
        return _Return(compiled, model).state_dict()  # type: ignore[arg-type]
    around = compiled.state_dict()
    result = dict(model.state_dict()) | {
        name: around[key] for name in model.state_dict() if (key := f"model.{name}") in around
    }
    for path, part in inside.items():
        try:
            own = model.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(
                f"the compiled model has a part {path!r}, and {type(model).__name__} has none"
            ) from error
        alone = isinstance(own, LAYERS)  # A part that is one layer has it under the name "0".
        state = _Return(part, nn.Sequential(own) if alone else own).state_dict()
        result |= {f"{path}.{name.removeprefix('0.') if alone else name}": value for name, value in state.items()}
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value for name, value in result.items()
    }


def _compiled_inside(compiled: nn.Module) -> dict[str, GraphModule]:
    """The compiled parts of a model whose own forward stayed Python, by their paths in the user's model."""
    if isinstance(compiled, GraphModule) or report_of(compiled) is None:
        return {}
    return {
        name.removeprefix("model."): module
        for name, module in compiled.named_modules()
        if isinstance(module, GraphModule)
    }


@dataclass
class _Return:
    """The way back from a compiled model to its class.

    Attributes:
        own: the tensors of the class's state dict.
        state: the tensors of the compiled model's, which become those of the class's.
    """

    compiled: GraphModule
    model: nn.Module
    own: dict[str, Tensor] = field(init=False)
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        for given in (self.compiled, self.model):
            if not isinstance(given, nn.Module):
                raise CheckpointError(not_a_model(given))
        self.own, self.state = _tensors(self.model), _tensors(self.compiled)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Every entry of the class's state dict."""
        folds = self._folds()
        self._require_all({norm for _, norm in folds})
        layers_of = {norm: [layer for layer, other in folds if other == norm] for _, norm in folds}
        for (layer, norm), node in folds.items():
            self._unfold(layer, norm, node, is_shared=len(layers_of[norm]) > 1)
        self._under_own_names()
        self._move_new_biases()
        self._require_places()
        result = dict(self.model.state_dict())  # With what is no tensor, such as a module's extra state.
        for names in self._tied():
            given = next((self.state[name] for name in names if name in self.state), None)
            result |= {name: self.own[name] if given is None else given.to(self.own[name].dtype) for name in names}
        return result

    def _folds(self) -> dict[tuple[str, str], Node]:
        """(layer, BatchNorm) for every BatchNorm of the class that was folded, with a node that calls the layer."""
        nodes = {node.name: node for node in self.compiled.graph.nodes}
        found = {}
        for change in changes(self.compiled):
            folded = (change.pass_name, change.action) == ("FoldBatchNorm", "folded")
            if not folded or f"{change.target}.running_var" not in self.own:
                continue
            node = nodes.get(change.into)
            if node is None or f"{node.target}.weight" not in self.state:
                raise CheckpointError(
                    f"BatchNorm {change.target!r} was folded into {change.into!r}, which is not in the compiled model any "
                    f"more (low_rank makes two layers of one). {self._class} cannot hold that; save the compiled model "
                    "itself with fxprune.save"
                )
            found[str(node.target), change.target] = node
        return found

    def _require_all(self, folded: set[str]) -> None:
        """Raise for a part that the class computes with and the compiled model lacks."""
        called = {str(node.target) for node in self.compiled.graph.nodes if node.op == "call_module"}
        leaves = sorted(called.intersection(name for name, _ in self.model.named_modules()))
        try:
            used = set(trace(self.model, exclude=leaves).state_dict())
        except TraceError:
            return  # It was compiled with other leaves inside; what is used is not known.
        for names in self._tied():
            there = any(name in self.state or _parent(name) in folded or name.endswith(".bias") for name in names)
            if there or used.isdisjoint(names):
                continue
            raise CheckpointError(
                f"the compiled model has nothing for {names[0]!r} of {self._class}. If it is an instance of the class that was "
                "compiled, it was compiled twice: compile the original model in one go, or with "
                "Options(fold_batchnorm=False)"
            )

    def _unfold(self, layer: str, norm: str, node: Node, *, is_shared: bool) -> None:
        """Divide a layer's weight by what BatchNorm will multiply with, and find a place for its bias."""
        module: Any = self.model.get_submodule(norm)
        if not isinstance(module, _BatchNorm):
            raise CheckpointError(
                f"{norm!r} was a BatchNorm when the model was compiled; {self._class} has another layer there"
            )
        recorded = channel_order(node)[1]
        order = slice(None) if recorded is None else torch.as_tensor(recorded, dtype=torch.long)
        for name in ("running_mean", "running_var", "weight", "bias"):
            if f"{norm}.{name}" in self.own:
                self.state.setdefault(f"{norm}.{name}", self.own[f"{norm}.{name}"][order])
        mean = self.state[f"{norm}.running_mean"].double()
        deviation = (self.state[f"{norm}.running_var"].double() + module.eps).sqrt()
        factor = self.state[f"{norm}.weight"].double() / deviation if f"{norm}.weight" in self.state else 1 / deviation
        weight, bias = self.state[f"{layer}.weight"].double(), self.state.pop(f"{layer}.bias").double()
        groups = getattr(module_of(node), "groups", 1) if isinstance(module_of(node), _ConvTransposeNd) else 0
        rows = _rows_first(weight, groups)
        dead = (factor.abs() < _NO_FACTOR) & (rows.flatten(1) != 0).any(1)
        if dead.any() and is_shared:
            raise CheckpointError(
                f"BatchNorm {norm!r} multiplies channels of layer {layer!r} by 0 and serves another layer too, so it cannot "
                "be unfolded; compile with Options(fold_batchnorm=False, bias_correction=False)"
            )
        if dead.any():
            self.state[f"{norm}.weight"] = torch.where(dead, deviation, factor * deviation)
            factor = torch.where(dead, 1.0, factor)
        divisor = torch.where(factor.abs() < _NO_FACTOR, 1.0, factor)
        self.state[f"{layer}.weight"] = _rows_first(rows / divisor.view(-1, *[1] * (rows.dim() - 1)), groups)

        own_bias = self.own.get(f"{layer}.bias")
        if own_bias is not None:
            self.state[f"{layer}.bias"] = own_bias[order]
        if f"{norm}.bias" in self.own and not is_shared:
            before = 0.0 if own_bias is None else own_bias[order].double()
            self.state[f"{norm}.bias"] = bias + factor * (mean - before)
        elif own_bias is not None:
            after = self.state[f"{norm}.bias"].double() if f"{norm}.bias" in self.state else 0.0
            self.state[f"{layer}.bias"] = (bias - after) / divisor + mean
        elif not is_shared:
            self.state[f"{norm}.running_mean"] = -bias / divisor
        else:
            raise CheckpointError(
                f"layer {layer!r} has no bias in {self._class} and shares BatchNorm {norm!r} with another layer, so there is "
                "no place for its own; compile with Options(fold_batchnorm=False, bias_correction=False)"
            )

    def _move_new_biases(self) -> None:
        """Take biases that compiling gave to layers without one into the BatchNorm behind them, where one was left."""
        for node in self.compiled.graph.nodes:
            key = f"{node.target}.bias"
            if node.op != "call_module" or key not in self.state or key in self.own:
                continue
            bias, mean = self.state.pop(key), f"{next(iter(node.users)).target}.running_mean"
            if (
                len(node.users) == 1
                and isinstance(module_of(next(iter(node.users))), _BatchNorm)
                and mean in self.state
            ):
                self.state[mean] = self.state[mean].double() - bias.double()
            elif f"{node.target}.weight" in self.own:
                self._drop_new_bias(str(node.target), bias)

    def _drop_new_bias(self, layer: str, bias: Tensor) -> None:
        """Raise for a bias that is worth something."""
        if (bias != 0).any():
            raise CheckpointError(
                f"compiling gave layer {layer!r} a bias, and {self._class}'s has none; make that layer with "
                "bias=True, or compile with Options(bias_correction=False)"
            )

    def _under_own_names(self) -> None:
        """Give weights that compiling has renamed, transposed or taken out of a larger one the form that the class has."""
        found = origins(self.compiled)
        for name in [key for key in self.state if key.endswith(".bias") and key not in self.own and key not in found]:
            if f"{_parent(name)}.weight" in found:
                self._drop_new_bias(_parent(name), self.state.pop(name))
        for name, origin in found.items():
            if name not in self.state or name in self.own or not self.own.keys() >= set(origin.names):
                continue
            if origin.how == "computed":
                continue
            (own,), value = origin.names, self.state.pop(name)
            if origin.how == "rows":
                first, last = origin.rows
                self.state.setdefault(own, self.own[own].clone())[first:last] = value
            else:
                self.state[own] = value.t() if origin.how == "transposed" else value

    def _require_places(self) -> None:
        """Raise for what the class has no place for."""
        for name, tensor in self.state.items():
            if name not in self.own and "_tensor_constant" not in name:
                remedy = "give an instance of the class that was compiled"
                if f"{_parent(_parent(name))}.weight" in self.own:
                    remedy = "low_rank made two layers of one there; save the compiled model itself with fxprune.save"
                raise CheckpointError(f"{self._class} has no place for {name!r} of the compiled model: {remedy}")
            if name in self.own and tensor.shape != self.own[name].shape:
                raise CheckpointError(
                    f"{name!r} is {tuple(tensor.shape)} in the compiled model and {tuple(self.own[name].shape)} in "
                    f"{self._class}; give an instance that was made with the same arguments"
                )

    def _tied(self) -> list[list[str]]:
        """The names in the class's state dict, all names of one tensor together."""
        tensors = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        identity = {name: id(tensor) for name, tensor in tensors}
        groups: dict[int | str, list[str]] = {}
        for name in self.own:
            groups.setdefault(identity.get(name, name), []).append(name)
        return list(groups.values())

    @property
    def _class(self) -> str:
        return type(self.model).__name__


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a state dict's tensors, on the CPU."""
    return {name: t.detach().cpu().clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _rows_first(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight (C, R/G, *kernel) as (R, C/G, *kernel), and back; any other (groups 0) as it is."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if groups else weight


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
