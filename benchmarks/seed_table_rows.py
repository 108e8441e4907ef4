"""The rows of the seed table."""

from __future__ import annotations

from dataclasses import dataclass


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
