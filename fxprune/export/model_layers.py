"""The layers of a model whose weights an ONNX file has to hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.errors import ValidationError
from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxprune.report import PruneReport

MANY_ZEROS = 0.25  # share of a weight; those of trained layers that nobody pruned have next to none
LAYERS = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)


@dataclass(frozen=True)
class ModelLayer:
    """One layer of the model.

    Attributes:
        name: module name.
        op: module class.
        parameters: every name that its weight has in the model.
        weight: (R, C/G, *kernel), (R, C), or (C, R/G, *kernel) of a transposed convolution; on the CPU.
        groups: G.
        pattern: what it was pruned to, or "".
    """

    name: str
    op: str
    parameters: tuple[str, ...]
    weight: Tensor
    groups: int
    pattern: str


def prune_report(model: nn.Module) -> PruneReport | None:
    """The report that `compile` left with a model, if any."""
    report = getattr(model, "meta", {}).get("fxprune_report")
    return report if isinstance(report, PruneReport) else None


def unchecked_pattern(model: nn.Module) -> str:
    """Why no sparsity pattern of a model can be checked although it may have been pruned; "" where that is not so.

    A model without a report may have lost it: torch.fx.symbolic_trace, torch.export and loading the weights into another
    model all leave it behind. Graphs are suspect, and so is any model with many zeros.
    """
    if prune_report(model) is not None:
        return ""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    sparse = sum(int(torch.count_nonzero(weight)) <= (1 - MANY_ZEROS) * weight.numel() for weight in weights)
    if not sparse and not any(isinstance(module, GraphModule) for module in model.modules()):
        return ""
    found = f", although {sparse} of its {len(weights)} weights have many zeros" if sparse else ""
    return (
        f"No sparsity pattern was checked: this {type(model).__name__} carries no report of fxprune's{found}. If it was "
        "pruned, export the model that fxprune.compile returned, a copy of it, or what fxprune.load gives"
    )


@contextmanager
def noting_calls(model: nn.Module, called: set[nn.Module]) -> Iterator[None]:
    """Add every layer that runs inside the block to `called`."""

    def note(module: nn.Module, inputs: object, output: object) -> None:
        called.add(module)

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, LAYERS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def model_layers(model: nn.Module, called: set[nn.Module]) -> list[ModelLayer]:
    """Layers that ran, and layers that the model's report calls pruned.

    Raises:
        ValidationError: the report names a pruned layer that the model does not have.
    """
    report = prune_report(model)
    patterns = {layer.name: layer.pattern for layer in report.layers if layer.pattern} if report else {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = []
    listed: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):  # the report may use any of a shared layer's names
        wanted = name in patterns or (module in called and module not in listed)
        if not isinstance(module, LAYERS) or not wanted:
            continue
        listed.add(module)
        weight = module.weight
        layers.append(
            ModelLayer(
                name=name,
                op=type(module).__name__,
                parameters=tuple(names.get(id(weight), [f"{name}.weight"])),
                weight=weight.detach().cpu(),
                groups=int(getattr(module, "groups", 1)),
                pattern=patterns.get(name, ""),
            )
        )
    if missing := set(patterns) - {layer.name for layer in layers}:
        raise ValidationError(
            f"the model's report says that {', '.join(sorted(missing))} was pruned, but the model has no such layer; "
            "was it changed after fxprune.compile, or is it a graph of torch.export's? Export the model that "
            "fxprune.compile returned"
        )
    return layers
