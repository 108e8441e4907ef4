"""The rows of a benchmark grid, and the CSV that holds them."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fxprune.errors import DataError
from fxprune.experiments import csv_rows

OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class Row:
    """One line of the CSV: what was run, then what came out. Accuracies in percent, agreement as a share.

    Attributes:
        name: the model's label.
        task: model, data and further fields of the task, as JSON.
        weights: the first digits of the weights file's SHA-256, or "pretrained": other weights are another row.
        pattern: the recipe asked for, in words.
        method: as asked for.
        seed: of the calibration images, and of whatever is random.
        calibration_images: how many.
        settings: options, exclude and test_images, as JSON.
        status: "ok" or "failed".
        error: what went wrong.
    """

    name: str
    task: str
    weights: str
    pattern: str
    method: str
    seed: int
    calibration_images: int
    settings: str
    status: str = ""
    dense_accuracy: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    kl: float | None = None
    sparsity: float | None = None
    layers_pruned: int | None = None
    seconds: float | None = None
    commit: str = ""
    error: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same row: all that comes before the status."""
        return tuple(str(getattr(self, name)) for name in KEY)


KEY = tuple(field.name for field in dataclasses.fields(Row))[:8]


def read_rows(path: str | Path) -> list[Row]:
    """Read a CSV of `write_rows`.

    Raises:
        DataError: it is absent, or not such a CSV.
    """
    fields = [field.name for field in dataclasses.fields(Row)]
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), None)
        if header != fields:
            raise DataError(f"{path} is no CSV of fxprune benchmark; its header is {header}")
        return csv_rows.read_rows(path, Row)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a CSV of fxprune benchmark: {error}") from error


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows to a CSV, whole or not at all."""
    csv_rows.write_rows(path, Row, rows)
