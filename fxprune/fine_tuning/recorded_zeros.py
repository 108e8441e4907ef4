"""Which weights were zero when a model was pruned, and whether they still are.

`fxprune.compile` keeps one bit a weight of every pruned layer in the graph module's annotation, from where `fxprune.save`
writes it to the file. Whoever says something about a model's zeros (its report, save, diff, export, evaluate) asks
`filled_zeros` first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from fxprune.annotations import graph_annotation, report_of
from fxprune.errors import GraphError
from fxprune.geometry import reduction_second
from fxprune.graph.model_argument import not_a_model
from fxprune.layers.zero_keeper import write_kept_zeros
from fxprune.operations import LAYERS
from fxprune.pattern import Pattern
from fxprune.report import LayerReport, PruneReport
from fxprune.tracing import matches

# A layer that a compilation left alone counts as pruned before if so much of it is zero; fewer zeros may be an accident.
_PRUNED_BEFORE = 0.5


class FilledZerosWarning(UserWarning):
    """A model is used as if it were pruned, but its zeros have been filled in."""


@dataclass(frozen=True, eq=False)
class ZeroMask:
    """Which weights of one layer were zero.

    Attributes:
        name: module name.
        pattern: what the layer was pruned to; "" if it was pruned before it was compiled.
        shape: of the weight.
        bits: uint8, one bit a weight in the weight's own order, the first in the lowest bit; set where the weight was zero.
    """

    name: str
    pattern: str
    shape: tuple[int, ...]
    bits: Tensor

    def __post_init__(self) -> None:
        whole = isinstance(self.bits, Tensor) and self.bits.dtype == torch.uint8 and self.bits.dim() == 1
        if not whole or len(self.bits) != math.ceil(math.prod(self.shape) / 8):
            raise ValueError(f"the zeros of layer {self.name!r} are not one bit for each weight of shape {self.shape}")

    @classmethod
    def of(cls, name: str, weight: Tensor, pattern: str) -> ZeroMask:
        """The zeros that a weight holds."""
        flat = (weight.detach() == 0).flatten().cpu().to(torch.uint8)
        bytes_ = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        return cls(name, pattern, tuple(weight.shape), (bytes_ << _places()).sum(1, dtype=torch.uint8))

    def zeros(self) -> Tensor:
        """The mask in the weight's shape, bool, on the CPU; True where the weight was zero."""
        bits = (self.bits[:, None] >> _places()) & 1
        return bits.flatten()[: math.prod(self.shape)].bool().view(self.shape)


@dataclass(frozen=True)
class FilledZeros:
    """What became of the recorded zeros; false if they are all there. `print` it.

    Attributes:
        layers: layers that lost zeros, each with the number of zeros lost.
        recorded: zeros that the model had when it was pruned.
        replaced: pruned layers whose weight has another shape now, each with the shape it had.
        restorable: whether it is known where the zeros were.
    """

    layers: Mapping[str, int] = field(default_factory=dict)
    recorded: int = 0
    replaced: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    restorable: bool = True

    @property
    def count(self) -> int:
        """How many zeros were filled in."""
        return sum(self.layers.values())

    def __bool__(self) -> bool:
        return bool(self.layers)

    def __str__(self) -> str:
        if not self:
            return f"all {self.recorded:,} zeros are there"
        back = "fxprune.restore_zeros(compiled) puts them back"
        if not self.restorable:
            back = "where they were is not recorded, so compile the model again"
        return (
            f"{self.count:,} of {self.recorded:,} zeros have been filled in since the model was pruned: {back}; "
            "fxprune.keep_zeros(compiled) keeps them while training"
        )


def record_zeros(model: nn.Module, layers: Iterable[LayerReport]) -> tuple[ZeroMask, ...]:
    """The zeros of the layers that are pruned by their report, or were before."""
    found = {}
    for layer in layers:
        module = _layer(model, layer.name)
        if module is not None and (layer.pattern or layer.sparsity >= _PRUNED_BEFORE):
            found[layer.name] = ZeroMask.of(layer.name, module.weight, layer.pattern)
    return tuple(found.values())


def recorded_masks(model: nn.Module) -> dict[str, ZeroMask]:
    """The masks recorded for a model, or for the compiled models inside it (a wrapper, say), by module name."""
    return {
        f"{prefix}.{mask.name}" if prefix else mask.name: mask
        for prefix, module in model.named_modules()
        for mask in graph_annotation(module).zeros
    }


def filled_zeros(model: nn.Module) -> FilledZeros:
    """Say whether a pruned model still has its zeros.

    A layer that has as many zeros as ever, in other places, and whose pattern holds, has lost none.

    Args:
        model: what `fxprune.compile` returned, or a module around it; of a model that was never compiled nothing is known.
    """
    write_kept_zeros(model)
    masks = recorded_masks(model)
    if not masks:
        return _by_report(model)
    filled, replaced, recorded = {}, {}, 0
    for name, mask in masks.items():
        module = _layer(model, name)
        if module is None:
            continue
        weight = module.weight.detach().cpu()
        if tuple(weight.shape) != mask.shape:
            replaced[name] = mask.shape
            continue
        zeros = mask.zeros()
        count = int(torch.count_nonzero(zeros))
        recorded += count
        lost = int(torch.count_nonzero((weight != 0) & zeros))
        if lost and not _zeros_moved(module, count, mask.pattern):
            filled[name] = lost
    return FilledZeros(filled, recorded, replaced)


def restore_zeros(model: nn.Module, *, exclude: str | Sequence[str] = ()) -> dict[str, int]:
    """Set every weight to zero again that was zero when the model was pruned.

    Args:
        model: what `fxprune.compile` or `fxprune.load` returned, or a module around it; its weights are changed in place.
        exclude: module names or fnmatch patterns of layers to leave as they are.

    Returns:
        How many weights were set to zero, by layer; 0 for layers that had all their zeros.

    Raises:
        GraphError: no zeros were recorded, `exclude` names none of the layers, a layer is gone, or its weight has another
            shape now; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise GraphError(not_a_model(model))
    masks = recorded_masks(model)
    if not masks:
        raise GraphError(
            f"no zeros were recorded for {type(model).__name__}, so there are none to put back; give what fxprune.compile "
            "or fxprune.load returned, and compile the model again if it was saved before zeros were recorded"
        )
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    if unknown := [pattern for pattern in exclude if not any(matches(name, [pattern]) for name in masks)]:
        raise GraphError(f"exclude: {unknown[0]!r} matches no pruned layer; there are: {', '.join(masks)}")
    wanted = {name: mask for name, mask in masks.items() if not matches(name, exclude)}
    layers = {name: _layer(model, name) for name in wanted}
    wrong = {
        name: "is gone" if layer is None else f"is {_x(layer.weight.shape)} now"
        for name, layer in layers.items()
        if layer is None or tuple(layer.weight.shape) != wanted[name].shape
    }
    if wrong:
        what = "; ".join(f"layer {name!r} was {_x(wanted[name].shape)} and {now}" for name, now in wrong.items())
        raise GraphError(
            f"the recorded zeros do not fit: {what}. Nothing was changed; fxprune.restore_zeros(compiled, "
            f"exclude={tuple(wrong)!r}) puts back those of the other layers"
        )
    restored = {}
    for name, mask in wanted.items():
        layer = layers[name]
        assert layer is not None
        zeros = mask.zeros().to(layer.weight.device)
        restored[name] = int((layer.weight.detach()[zeros] != 0).sum())
        layer.weight.data.masked_fill_(zeros, 0)
    return restored


def current_report(model: nn.Module) -> PruneReport | None:
    """The report that `compile` left with a model, with what has become of its zeros since; None if there is none."""
    report = report_of(model)
    if report is None:
        return None
    filled = filled_zeros(model)
    if not filled and not filled.replaced:
        return report
    layers = tuple(_current_layer(model, layer, filled) for layer in report.layers)
    return replace(report, layers=layers, notes=(*report.notes, str(filled)) if filled else report.notes)


def _current_layer(model: nn.Module, layer: LayerReport, filled: FilledZeros) -> LayerReport:
    module = _layer(model, layer.name)
    if module is None or (layer.name not in filled.layers and layer.name not in filled.replaced):
        return layer
    sparsity = _share(module.weight)
    if layer.name in filled.replaced:
        reason = f"replaced since it was pruned as {_x(filled.replaced[layer.name])}"
        return LayerReport(
            layer.name, type(module).__name__, tuple(module.weight.shape), reason=reason, sparsity=sparsity
        )
    reason = f"{filled.layers[layer.name]:,} zeros filled in since it was pruned to {layer.pattern or 'what it was'}"
    return replace(layer, pattern="", verdict="", reason=reason, sparsity=sparsity)


def _by_report(model: nn.Module) -> FilledZeros:
    """What the report's figures tell where the places of the zeros were not recorded."""
    report = report_of(model)
    layers = {} if report is None else {layer.name: layer for layer in report.layers}
    filled, recorded = {}, 0
    for name, layer in layers.items():
        module = _layer(model, name)
        if not layer.pattern or module is None or tuple(module.weight.shape) != layer.shape:
            continue
        zeros = round(layer.sparsity * layer.weights)
        recorded += zeros
        lost = zeros - round(_share(module.weight) * layer.weights)
        if lost > 0:
            filled[name] = lost
    return FilledZeros(filled, recorded, restorable=False)


def _zeros_moved(module: Layer, zeros: int, pattern: str) -> bool:
    """Whether a weight has as many zeros as it had and its pattern holds: another mask, but a mask."""
    weight = reduction_second(module).detach().cpu()
    enough = weight.numel() - int(torch.count_nonzero(weight)) >= zeros
    return enough and (not pattern or Pattern.parse(pattern).check(weight).ok)


class Layer(nn.Module):
    """What mypy is to know of a Conv or Linear module."""

    weight: nn.Parameter


def _layer(model: nn.Module, name: str) -> Layer | None:
    """The Conv or Linear module of a name, if there is one whose weight is a plain parameter."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return cast(Layer, module) if _is_layer(module) else None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) and isinstance(module._parameters.get("weight"), nn.Parameter)


def layers_with_zeros(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Conv and Linear layers with zeros in their weight; one that is zero throughout is taken for not trained yet."""
    for name, module in model.named_modules():
        if _is_layer(module) and 0 < _share(cast(Layer, module).weight) < 1:
            yield name, cast(Layer, module)


def _share(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight.detach())) / max(weight.numel(), 1)


def _places() -> Tensor:
    return torch.arange(8, dtype=torch.uint8)


def _x(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
