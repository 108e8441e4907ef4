from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw pictures")

from benchmarks import seed_table
from benchmarks.seed_table import Task, run
from benchmarks.seed_table_output import write_markdown, write_plot
from benchmarks.seed_table_rows import Row
from fxprune.experiments.csv_rows import read_rows
from fxprune.experiments.training_recipe import TrainingRecipe


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Ten bright squares in ten places, one a class."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 200), ("test", 50)):
        labels = np.arange(count) % 10
        images = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + label // 5 * 12 : 12 + label // 5 * 12, label % 5 * 5 : label % 5 * 5 + 5] = 255
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(tmp_path / "squares.npz", **arrays)
    return Task(
        "squares", "simple_cnn", "squares.npz", TrainingRecipe(2, learning_rate=0.02), width=8, allowed_drop=50.0
    )


def test_the_table_is_made_once_and_then_read(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_table, "METHODS", ("magnitude", "sparsegpt"))
    table = tmp_path / "table.csv"
    rows = run([task], tmp_path, table, tmp_path / "weights", calibration_images=100)
    assert [row.method for row in rows] == ["magnitude", "sparsegpt"]
    assert rows[1].dense_accuracy > 30
    assert rows[1].layers_pruned == 3
    assert rows[1].onnx_accuracy == pytest.approx(rows[1].accuracy)
    assert (tmp_path / "weights" / "simple_cnn_sparsegpt_2-4.onnx").is_file()
    assert read_rows(table, Row) == rows

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(seed_table, "train", fail)
    assert run([task], tmp_path, table, tmp_path / "weights", calibration_images=100) == rows

    write_markdown(tmp_path / "table.md", rows, "a note")
    write_plot(tmp_path / "table", rows)
    text = (tmp_path / "table.md").read_text()
    assert "at most 50 allowed: met." in text
    assert "a note" in text
    assert (tmp_path / "table.png").stat().st_size > 1000
