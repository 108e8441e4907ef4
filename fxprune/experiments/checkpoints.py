"""Reads trained weights of any common shape into a model, and writes training checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.errors import CheckpointError
from fxprune.files import read_torch_file, save_tensors

# Where the usual training scripts keep the weights, in the order in which they are looked for.
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model_state", "model")
# What DataParallel, DistributedDataParallel and torch.compile put before every name.
WRAPPERS = ("module.", "_orig_mod.")
SHOWN = 5

Scalar = float | int | str | bool | None


@dataclass(frozen=True)
class Checkpoint:
    """What a training checkpoint says beside the weights.

    Attributes:
        epoch: epochs finished when it was written, None where unknown.
        accuracy: test accuracy in percent, None where unknown.
        extra: whatever else the writer noted down.
    """

    epoch: int | None = None
    accuracy: float | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights from a file into a model, in place.

    The file is a bare state dict, or a dict that holds one under ``state_dict``, ``model_state_dict``,
    ``model_state`` or ``model``, or a ``.safetensors`` file. Prefixes that DataParallel and
    torch.compile add are removed. No code in the file is run (``weights_only=True``).

    ``num_batches_tracked`` may be missing, as it is in files from torch < 0.4.1: inference does not
    use it.

    Args:
        model: receives the weights, on its own device and in its own dtype; unchanged on error.
        path: the file.

    Returns:
        ``model``.

    Raises:
        CheckpointError: the file is absent, unreadable or holds no weights, or its names or shapes are
            not the model's; the message counts and shows missing, unexpected and wrongly shaped ones.
    """
    _fill(model, _read(Path(path)), Path(path))
    return model


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epoch: int | None = None,
    accuracy: float | None = None,
    extra: Mapping[str, Scalar] | None = None,
) -> None:
    """Write a training checkpoint that ``load_weights`` and ``load_checkpoint`` read.

    The file is written beside its final place and moved there once complete, so an interrupted run
    leaves the previous checkpoint whole.

    Args:
        path: the file; its folder is made where absent.
        model: its ``state_dict`` is saved.
        optimizer: its state, to go on training.
        epoch: epochs finished.
        accuracy: test accuracy in percent.
        extra: further plain values to note down.
    """
    content = {
        "state_dict": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "epoch": epoch,
        "accuracy": accuracy,
        "extra": dict(extra or {}),
    }
    save_tensors(content, path)


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Checkpoint:
    """Load a training checkpoint into a model and, where given, an optimizer.

    Raises:
        CheckpointError: as ``load_weights``, or an optimizer is given and the file holds no state for it.
    """
    content = _read(Path(path))
    _fill(model, content, Path(path))
    if optimizer is not None:
        state = content.get("optimizer")
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{path} holds no optimizer state; it can start a training, not resume one")
        try:
            optimizer.load_state_dict(dict(state))
        except ValueError as error:
            raise CheckpointError(f"{path}: its optimizer state is for another optimizer: {error}") from error
    return Checkpoint(content.get("epoch"), content.get("accuracy"), content.get("extra") or {})


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        try:
            safetensors = importlib.import_module("safetensors.torch")
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"{path} needs the safetensors package, which is not installed: pip install safetensors"
            ) from error
        broken: type[Exception] = importlib.import_module("safetensors").SafetensorError
        try:
            tensors: Mapping[str, Any] = safetensors.load_file(str(path))
        except broken as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        return tensors
    return read_torch_file(path)


def _fill(model: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    weights = _unwrapped(_find_weights(content, path), set(model.state_dict()))
    _check(model, weights, path)
    model.load_state_dict(weights, strict=False)


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, torch.Tensor) for item in value.values())
    )


def _find_weights(content: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    for key in WEIGHT_KEYS:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            return _find_weights(inner, path)
    if not _is_state_dict(content):
        raise CheckpointError(
            f"{path} holds no state dict, neither bare nor under {', '.join(WEIGHT_KEYS)}; "
            f"its keys: {_some([str(key) for key in content])}"
        )
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


def _unwrapped(weights: dict[str, torch.Tensor], wanted: set[str]) -> dict[str, torch.Tensor]:
    # A model may have a child that is truly called "module", or be wrapped itself: names that it
    # knows stay as they are.
    result: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        name = key
        while name not in wanted and name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        # torch.compile of a part of the model leaves its mark inside the name.
        if name not in wanted:
            name = name.replace("._orig_mod.", ".")
        result[name] = value
    return result


def _check(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    wanted = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    missing = [key for key in wanted if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in wanted]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
    problems = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in found if keys]
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__} ({len(wanted)} tensors in the model, "
            f"{len(weights)} in the file)\n  " + "\n  ".join(problems)
        )


def _some(keys: list[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
