from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fxprune.experiments.grid_rows import read_rows

Fxprune = Callable[..., str]


@pytest.fixture
def grid(own_model: Path, digits: Path, trained: Path, tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"register: {own_model}\npatterns: [2:4, 0.8]\nmethods: [magnitude]\ncalibration_images: 100\nmodels:\n"
        f"  - {{name: good, model: tiny_cli, data: {digits}, weights: {trained / 'last.pt'}}}\n"
        f"  - {{name: bad, model: tiny_cli, data: {digits}, weights: {trained / 'absent.pt'}}}\n"
    )
    return path


def test_it_fills_a_csv_and_goes_on(fxprune: Fxprune, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "r.csv"
    said = fxprune("benchmark", grid, "--out", out, code=1)
    assert "2 of 4 rows finished" in said
    assert "2 of 4 rows failed; the column `error`" in said.replace("\n", " ")
    assert "4/4 bad 0.8 magnitude seed 0: failed: CheckpointError: there is no file" in said
    first = read_rows(out)
    grid.write_text(grid.read_text().replace("absent.pt", "best.pt"))
    fxprune("benchmark", grid, "--out", out)
    rows = read_rows(out)
    assert rows[:2] == first[:2]
    assert [row.status for row in rows] == ["ok"] * 4
    assert {row.name for row in rows} == {"good", "bad"}


def test_a_wrong_grid_is_one_line(fxprune: Fxprune, grid: Path, tmp_path: Path) -> None:
    grid.write_text(grid.read_text().replace("methods", "method"))
    said = fxprune("benchmark", grid, "--out", tmp_path / "r.csv", code=1)
    assert "unknown key 'method'; did you mean methods" in said
    assert not (tmp_path / "r.csv").exists()
