"""The layers of a model whose weights an ONNX file has to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.errors import ValidationError
from fxprune.fine_tuning.recorded_zeros import current_report
from fxprune.graph import without_input
from fxprune.operations import LAYERS
from fxprune.report import PruneReport

UNCHECKED = "No sparsity pattern was checked"
# A dense weight with as large a share of zeros was most likely pruned.
_MANY_ZEROS = 0.25


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


def is_read(
    model: nn.Module, layer: str, run: Callable[[tuple[Tensor, ...]], dict[str, Tensor]], inputs: tuple[Tensor, ...]
) -> bool:
    """Whether what a layer gives has any influence on the model's outputs, found out by putting other numbers in its place.

    Args:
        model: the model.
        layer: name of the module.
        run: the model as a function, from `evaluating`.
        inputs: for one call.
    """
    before = run(inputs)
    if not all(bool(output.isfinite().all()) for output in before.values()):
        return True  # nothing could be seen
    for change in (lambda output: torch.full_like(output, torch.nan), lambda output: 2 * output.abs() + 1):
        hook = model.get_submodule(layer).register_forward_hook(lambda _, __, output, change=change: change(output))
        try:
            after = run(inputs)
        except Exception:  # whatever the model raises on such numbers: it reads them
            return True
        finally:
            hook.remove()
        same = before.keys() == after.keys() and all(
            torch.allclose(before[name].double(), after[name].double(), rtol=0, atol=0, equal_nan=True)
            for name in before
        )
        if not same:
            return True
    return False


def layers_without_input(model: nn.Module) -> set[str]:
    """The names of modules whose every call reads what the sizes of the inputs settle; of a model that is no graph, none."""
    if not isinstance(model, GraphModule):
        return set()
    constant = without_input(model.graph, sizes_given=True)
    calls = model.graph.find_nodes(op="call_module")
    return {str(n.target) for n in calls if n in constant} - {str(n.target) for n in calls if n not in constant}


def pruned_without_report(model: nn.Module) -> str:
    """Says that a model looks pruned but carries no report, so that no pattern can be checked; "" if all is well."""
    from fxprune.compiled import CompiledModule  # at the top it would be a circle

    if prune_report(model) is not None:
        return ""
    sparse = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and isinstance(module.weight, Tensor) and _zeros(module.weight) >= _MANY_ZEROS
    ]
    if not sparse and not isinstance(model, CompiledModule):
        return ""
    shown = ", ".join(sparse[:3]) + (f" and {len(sparse) - 3} more" if len(sparse) > 3 else "")
    holds = f"many weights of {shown} are zero, but" if sparse else "fxprune.compile made this model, but"
    return (
        f"{UNCHECKED}: {holds} the model carries no report of what it was pruned to. Pass what "
        "fxprune.compile or fxprune.load returned; a model traced or assembled anew has lost it"
    )


def _zeros(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)


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
        weight: Any = module.weight
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
