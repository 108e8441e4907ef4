"""Models by name: those registered here, torchvision's, timm's as ``timm/<name>``, and ``file.py:Class``."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fxprune.errors import ModelError, UnknownModelError
from fxprune.models import timm_zoo, torchvision_zoo, user_code
from fxprune.models.info import IMAGENET_MEAN, IMAGENET_STD, ModelInfo

Factory = Callable[..., nn.Module]
F = TypeVar("F", bound=Factory)


@dataclass(frozen=True)
class _Entry:
    info: ModelInfo
    factory: Factory


_ENTRIES: dict[str, _Entry] = {}


def register(
    name: str,
    *,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    num_classes: int = 1000,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    source: str = "",
) -> Callable[[F], F]:
    """Decorate a model class, or a function that builds a model, to give it a name.

    Args:
        name: the name for ``create``; "timm/..." is kept for timm.
        input_shape: (channels, height, width) of one input image.
        num_classes: output width that the factory builds by default.
        mean: per-channel mean of inputs scaled to [0, 1].
        std: per-channel standard deviation, same scale.
        source: where the model comes from, for the reader.

    Returns:
        A decorator that returns what it was given.

    Raises:
        ModelError: the name is taken by another model (running a notebook cell again is fine), or
            ``mean`` and ``std`` do not have one figure a channel.

    Example:
        >>> from torch import nn
        >>> @register("tiny", input_shape=(1, 8, 8), num_classes=2, mean=(0.5,), std=(0.5,))
        ... class Tiny(nn.Sequential):
        ...     def __init__(self, num_classes: int = 2) -> None:
        ...         super().__init__(nn.Flatten(), nn.Linear(64, num_classes))
        >>> create("tiny")[1].out_features
        2
    """
    info = ModelInfo(name, input_shape, num_classes, tuple(mean), tuple(std), source)
    channels = input_shape[0]
    if len(info.mean) != channels or len(info.std) != channels:
        raise ModelError(
            f"model {name!r} takes {channels} channel(s) but has {len(info.mean)} mean and "
            f"{len(info.std)} std figure(s); give one of each per channel"
        )
    if name.startswith(timm_zoo.PREFIX):
        raise ModelError(f"model name {name!r}: the prefix {timm_zoo.PREFIX!r} is kept for timm's models")
    if user_code.is_own(name):
        raise ModelError(f"model name {name!r}: a name with a colon, or that ends in .py, says where a model's code is")

    def add(factory: F) -> F:
        known = _ENTRIES.get(name)
        if known is not None and _origin(known.factory) != _origin(factory):
            raise ModelError(f"model name {name!r} is taken by {_origin(known.factory)}; register under another name")
        # This package's own names are known to be free; to ask torchvision takes as long as importing torch.
        own = _origin(factory).startswith("fxprune.models.")
        if known is None and not own and torchvision_zoo.has(name):
            raise ModelError(f"model name {name!r} is torchvision's; register under another name")
        _ENTRIES[name] = _Entry(info, factory)
        return factory

    return add


def create(name: str, *, num_classes: int | None = None, in_channels: int | None = None, **kwargs: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: a registered name, a torchvision classification model's, ``timm/<name>``, or a class or function of
            your own as ``file.py:Class`` or ``package.module:Class``.
        num_classes: output width; None is the model's own default.
        in_channels: input channels; None is the model's own default.
        **kwargs: handed to the model's factory. Weights are downloaded only where asked for
            (``weights="DEFAULT"`` for torchvision, ``pretrained=True`` for timm).

    Returns:
        The model in training mode, on the CPU unless the factory says otherwise.

    Raises:
        UnknownModelError: no such name; the message lists close ones.
        ModelError: the factory does not take one of the arguments.
    """
    given: dict[str, Any] = dict(kwargs)
    if num_classes is not None:
        given["num_classes"] = num_classes
    if user_code.is_own(name):
        return user_code.build(name, given if in_channels is None else given | {"in_channels": in_channels})
    if name.startswith(timm_zoo.PREFIX):
        if in_channels is not None:
            given["in_chans"] = in_channels
        return timm_zoo.create(name, given)
    if name in _ENTRIES:
        if in_channels is not None:
            given["in_channels"] = in_channels
        factory = _ENTRIES[name].factory
        signature = inspect.signature(factory)
        try:
            signature.bind(**given)
        except TypeError as error:
            raise ModelError(f"model {name!r} was asked for with {given} but takes {signature}") from error
        return factory(**given)
    if torchvision_zoo.has(name):
        return torchvision_zoo.create(name, in_channels, given)
    raise unknown_model(name)


def model_info(name: str) -> ModelInfo:
    """Return a model's input shape, class count and normalisation without building it.

    Raises:
        UnknownModelError: no such name; the message lists close ones.
        ModelError: nothing is known about the model, since its name only says where its code is.
    """
    if user_code.is_own(name):
        raise ModelError(
            f"nothing is known about {name!r} but its code; @fxprune.models.register(...) says its input shape and "
            "normalisation too"
        )
    if name.startswith(timm_zoo.PREFIX):
        return timm_zoo.info(name)
    if name in _ENTRIES:
        return _ENTRIES[name].info
    if torchvision_zoo.has(name):
        return torchvision_zoo.info(name)
    raise unknown_model(name)


def list_models(pattern: str = "*") -> list[str]:
    """List names that ``create`` knows: registered ones first, then torchvision's, each sorted.

    Args:
        pattern: shell-style pattern. One that starts with ``timm/`` lists timm's models instead,
            which the plain list leaves out for their number and their import time.
    """
    if pattern.startswith(timm_zoo.PREFIX):
        return fnmatch.filter(timm_zoo.names(), pattern)
    return fnmatch.filter(sorted(_ENTRIES) + torchvision_zoo.names(), pattern)


def unknown_model(name: str) -> UnknownModelError:
    """Return the error for a name that nobody knows, with the closest known names."""
    close = difflib.get_close_matches(name, list_models(), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "fxprune.models.list_models() lists them all"
    return UnknownModelError(f"there is no model named {name!r}; {hint}")


def _origin(factory: Factory) -> str:
    # A partial has no name of its own; what it wraps does.
    target = getattr(factory, "func", factory)
    return f"{target.__module__}.{target.__qualname__}"
