from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fxprune.experiments.grid_rows import Row, write_rows

pytest.importorskip("matplotlib")
Fxprune = Callable[..., str]


def test_a_csv_gives_two_pictures_a_model(fxprune: Fxprune, tmp_path: Path) -> None:
    row = ("{}", "w", "2:4", "admm", 0, 64, "{}")
    write_rows(
        tmp_path / "r.csv", [Row("net", *row, "ok", 91.0, 90.0, 99.0, 0.1, 0.5, 3, 1.0), Row("b", *row, "failed")]
    )
    said = fxprune("plot", tmp_path / "r.csv", "--out", tmp_path / "out")
    assert "1 failed rows are left out" in said
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "accuracy-net.png", "accuracy-net.svg", "methods-net.png", "methods-net.svg"
    }  # fmt: skip


def test_a_run_folder_gives_report_spectra_and_masks(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    said = fxprune("plot", pruned, pruned / "report.json", "--out", tmp_path, "--formats", "svg")
    assert {file.name for file in tmp_path.iterdir()} == {"layers-tiny.svg", "spectra-tiny.svg", "masks-tiny.svg"}
    assert "without the dense" not in said


def test_a_graph_alone_is_drawn_without_the_dense_model(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.pt").write_bytes((pruned / "pruned.pt").read_bytes())
    said = fxprune("plot", tmp_path / "alone.pt", "--out", tmp_path, "--formats", "svg", "--layers", "3")
    assert "without the dense model's spectra" in said
    assert (tmp_path / "spectra-alone.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x.txt",), "neither a .csv"),
        (("absent.csv",), "absent.csv"),
        (("absent.json",), "absent.json"),
        (("absent.pt",), "absent.pt"),
    ],
)
def test_other_files_are_errors(fxprune: Fxprune, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in fxprune("plot", *arguments, "--out", tmp_path, code=1)


def test_layers_that_are_not_there_are_errors(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    assert "match none of the pruned layers 3, 8" in fxprune(
        "plot", pruned, "--out", tmp_path, "--layers", "conv*", code=1
    )
    assert "unknown picture format 'gif'" in fxprune("plot", pruned, "--out", tmp_path, "--formats", "gif", code=1)
