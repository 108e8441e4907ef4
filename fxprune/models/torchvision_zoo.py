"""torchvision's classification models, under torchvision's names."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

from fxprune.errors import ModelError
from fxprune.models.info import ModelInfo

# Their default is a slow scipy initialisation (and a warning); asking for it by keyword still works.
_SLOW_INITIALISATION = frozenset({"googlenet", "inception_v3"})


def _torchvision() -> Any:
    # On first use: it takes as long to import as torch does.
    return importlib.import_module("torchvision")


@functools.cache
def _known() -> tuple[str, ...]:
    models = _torchvision().models
    return tuple(sorted(models.list_models(module=models)))


def names() -> list[str]:
    """List torchvision's classification models, sorted."""
    return list(_known())


def has(name: str) -> bool:
    """Say whether torchvision has a classification model of this name."""
    return name in _known()


def info(name: str) -> ModelInfo:
    """Read a model's defaults off its default weights' description; nothing is downloaded."""
    torchvision = _torchvision()
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    side = preset.crop_size[0]
    return ModelInfo(
        name,
        (3, side, side),
        len(weights.meta["categories"]),
        tuple(preset.mean),
        tuple(preset.std),
        f"torchvision {torchvision.__version__}",
    )


def create(name: str, in_channels: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """Build a torchvision model, with untrained weights unless ``kwargs["weights"]`` names some.

    Args:
        name: torchvision's name.
        in_channels: another count than 3 replaces the first conv by an untrained one.
        kwargs: handed to torchvision's builder.

    Raises:
        ModelError: torchvision refuses the arguments, or trained weights and another channel count
            are asked for together.
    """
    if in_channels not in (None, 3) and kwargs.get("weights") is not None:
        raise ModelError(
            f"torchvision's {name} has trained weights for 3 input channels, not {in_channels}; "
            "leave out weights= or repeat the grey channel three times"
        )
    if name in _SLOW_INITIALISATION:
        kwargs = {"init_weights": False, **kwargs}
    try:
        model: nn.Module = _torchvision().models.get_model(name, **kwargs)
    except (TypeError, ValueError) as error:
        raise ModelError(f"torchvision's {name} does not take {kwargs}: {error}") from error
    if in_channels not in (None, 3):
        _replace_first_conv(model, name, in_channels)
    return model


def _replace_first_conv(model: nn.Module, name: str, in_channels: int) -> None:
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.in_channels != 3 or isinstance(module.padding, str):
            break
        new = nn.Conv2d(
            in_channels,
            module.out_channels,
            (module.kernel_size[0], module.kernel_size[1]),
            stride=(module.stride[0], module.stride[1]),
            padding=(module.padding[0], module.padding[1]),
            bias=module.bias is not None,
        )
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        return
    raise ModelError(f"torchvision's {name} has no 3-channel first conv to replace; use in_channels=3")
