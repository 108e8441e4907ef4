"""The rows of the seed table, and the CSV that holds them."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxprune.files import atomic


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies, agreement and drop in percent or points.

    Attributes up to `method` say what was run: a row with the same ones is not run again.
    """

    name: str
    model: str
    width: int | None
    train_images: int
    epochs: int
    calibration_images: int
    method: str
    dense_accuracy: float = 0.0
    accuracy: float = 0.0
    drop: float = 0.0
    allowed_drop: float | None = None
    agreement: float = 0.0
    kl: float = 0.0
    sparsity: float = 0.0
    layers_pruned: int = 0
    onnx_accuracy: float = 0.0
    onnx_max_rel: float = 0.0
    test_images: int = 0
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    machine: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same row, as text."""
        return tuple(str(getattr(self, name)) for name in KEY)


KEY = ("name", "model", "width", "train_images", "epochs", "calibration_images", "method")
INTEGERS = {"width", "train_images", "epochs", "calibration_images", "layers_pruned", "test_images"}
TEXTS = {"name", "model", "method", "machine"}


def read_rows(path: Path) -> list[Row]:
    """The CSV's rows; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: _value(name, text) for name, text in line.items()}) for line in csv.DictReader(file)]


def _value(name: str, text: str) -> Any:
    if name in TEXTS:
        return text
    return None if text == "" else (int(text) if name in INTEGERS else float(text))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the CSV, whole or not at all."""
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows(dataclasses.astuple(row) for row in rows)
