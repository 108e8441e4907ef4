"""Reads a report.json again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fxprune.errors import DataError
from fxprune.report import LayerReport, PruneReport


def read_report(path: str | Path) -> PruneReport:
    """Read what `PruneReport.to_json` wrote.

    Raises:
        DataError: the file is absent, or none of that kind.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        content.pop("sparsity", None)  # computed from the layers
        layers = tuple(LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in content.pop("layers"))
        return PruneReport(layers=layers, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no report of fxprune's: {type(error).__name__}: {error}") from error
