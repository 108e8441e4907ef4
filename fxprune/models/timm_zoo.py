"""timm's models as ``timm/<name>``, where timm is installed."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, cast

from torch import nn

from fxprune.errors import ModelError, UnknownModelError
from fxprune.models.info import ModelInfo

PREFIX = "timm/"


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ModelError(f"models named {PREFIX}... need timm, which is not installed: {error}") from error


def names() -> list[str]:
    """List timm's models with the prefix.

    Raises:
        ModelError: timm is not installed.
    """
    return [PREFIX + name for name in _timm().list_models()]


def _checked(name: str) -> str:
    bare = name.removeprefix(PREFIX)
    # A tag names a set of weights: "resnet18.a1_in1k".
    known = _timm().list_models()
    if bare.partition(".")[0] not in known:
        close = difflib.get_close_matches(bare, known, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(PREFIX + n for n in close)}?" if close else "see timm.list_models()"
        raise UnknownModelError(f"timm has no model named {bare!r}; {hint}")
    return bare


def info(name: str) -> ModelInfo:
    """Read a timm model's defaults; nothing is downloaded.

    Raises:
        ModelError: timm is not installed, or says nothing about this model.
        UnknownModelError: timm has no such model.
    """
    timm = _timm()
    config = timm.get_pretrained_cfg(_checked(name))
    if config is None:
        raise ModelError(f"timm gives no configuration for {name!r}; normalisation and shape are unknown")
    return ModelInfo(
        name,
        tuple(config.input_size),
        config.num_classes,
        tuple(config.mean),
        tuple(config.std),
        f"timm {timm.__version__}",
    )


def create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a timm model, with untrained weights unless ``kwargs["pretrained"]`` is true.

    Raises:
        ModelError: timm is not installed or refuses the arguments.
        UnknownModelError: timm has no such model.
    """
    bare = _checked(name)
    try:
        return cast(nn.Module, _timm().create_model(bare, **kwargs))
    except (TypeError, ValueError) as error:
        raise ModelError(f"timm's {bare} does not take {kwargs}: {error}") from error
