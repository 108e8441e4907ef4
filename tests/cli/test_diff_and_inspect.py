from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fxprune import compile, export_onnx, save

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


def test_files_of_different_networks_are_an_error_that_names_both(
    fxprune: Fxprune, pruned: Path, tmp_path: Path
) -> None:
    other = compile(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)), [torch.randn(64, 8)], progress=False)
    save(other, tmp_path / "other.pt")
    export_onnx(other, tmp_path / "other.onnx", torch.randn(2, 8))
    for name, mine in (("pruned.pt", "other.pt"), ("model.onnx", "other.onnx")):
        said = " ".join(fxprune("diff", pruned / name, tmp_path / mine, code=1).split())
        assert "are different networks" in said
        assert "24x8" in said
        assert "Compare a model with what was made of it" in said
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "notes.txt").write_text("no weights")
    assert "not a file of fxprune.save's" in fxprune("diff", pruned / "pruned.pt", tmp_path / "weights.pt", code=1)
    assert "is text" in fxprune("diff", pruned / "pruned.pt", tmp_path / "notes.txt", code=1)
    assert "there is no file" in fxprune("diff", pruned / "pruned.pt", tmp_path / "absent.pt", code=1)


def test_an_onnx_file_is_inspected(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    said = fxprune("inspect", pruned / "model.onnx", "--json-file", tmp_path / "found.json")
    assert "2:4" in said
    assert len(json.loads((tmp_path / "found.json").read_text())["layers"]) == 3
    assert "absent.onnx" in fxprune("inspect", tmp_path / "absent.onnx", code=1)
