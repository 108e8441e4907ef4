"""The layers of a model whose weights an ONNX file has to hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from fxprune.errors import ValidationError
from fxprune.fine_tuning.recorded_zeros import LAYERS, current_report
from fxprune.report import PruneReport


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
    return current_report(model)


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
            "was it changed after fxprune.compile?"
        )
    return layers
