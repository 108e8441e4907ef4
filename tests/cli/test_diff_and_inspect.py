from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Fxprune = Callable[..., str]


def test_a_run_folder_is_compared_with_its_dense_model(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    said = fxprune("diff", pruned, "--html", tmp_path / "diff.html", "--json-file", tmp_path / "diff.json")
    assert "BatchNorm" in said
    assert "<html" in (tmp_path / "diff.html").read_text()
    assert json.loads((tmp_path / "diff.json").read_text())


def test_two_files_are_compared(fxprune: Fxprune, pruned: Path) -> None:
    for name in ("pruned.pt", "model.onnx"):
        assert "are the same" in " ".join(fxprune("diff", pruned / name, pruned / name).split())
    assert "a file" in fxprune("diff", pruned / "pruned.pt", pruned / "model.onnx", code=1)
    assert "name a second file" in fxprune("diff", pruned / "pruned.pt", code=1)


def test_an_onnx_file_is_inspected(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    said = fxprune("inspect", pruned / "model.onnx", "--json-file", tmp_path / "found.json")
    assert "2:4" in said
    assert len(json.loads((tmp_path / "found.json").read_text())["layers"]) == 3
    assert "absent.onnx" in fxprune("inspect", tmp_path / "absent.onnx", code=1)
