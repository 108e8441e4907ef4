"""What a run folder says about the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fxprune.experiments.runs import read_record
from fxprune.experiments.tasks import import_user_code, task_from


def dense_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The dense model that `fxprune prune` started from, with its weights, and the options of that run.

    Raises:
        DataError: the folder holds no finished run.
        FxPruneError: the model or its weights are no longer there.
    """
    record = read_record(folder)
    config: dict[str, Any] = record["config"]
    import_user_code(config.get("register") or ())
    return task_from(config).trained_model(record["results"].get("num_classes", 0)), config
