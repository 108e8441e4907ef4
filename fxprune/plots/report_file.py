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
        layers = tuple(LayerReport(**_with_tuples(layer)) for layer in content.pop("layers"))
        return PruneReport(layers=layers, **_with_tuples(content))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no report of fxprune's: {type(error).__name__}: {error}") from error


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """The same with tuples for lists: JSON knows lists only."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
