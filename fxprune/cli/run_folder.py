"""What a run folder says about the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.errors import OptionsError
from fxprune.experiments.tasks import import_user_code, task_from

if TYPE_CHECKING:
    from torch import nn


def dense_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The dense model that `fxprune prune` or `low-rank` started from, with its weights, and the options of that run.

    Raises:
        DataError: the folder holds no finished run.
        FxPruneError: the model or its weights are no longer there.
    """
    from fxprune.experiments.runs import read_record

    record = read_record(folder)
    config: dict[str, Any] = record["config"]
    import_user_code(config.get("register") or ())
    return task_from(config).trained_model(record["results"].get("num_classes", 0)), config


def input_shape(folder: Path) -> tuple[int, ...]:
    """(channels, height, width) of an input of the model in a run folder.

    Raises:
        DataError: the folder holds no finished run.
        OptionsError: the run does not say.
    """
    from fxprune.experiments.runs import read_record
    from fxprune.models import model_info

    record = read_record(folder)
    if shape := record["results"].get("input_shape"):
        return tuple(shape)
    config = record["config"]
    if not config.get("model"):
        raise OptionsError(f"{folder} does not say what the model's inputs are; give --input-shape 3,224,224")
    channels, height, width = model_info(config["model"]).input_shape
    side = config.get("image_size")
    return config.get("in_channels") or channels, side or height, side or width
