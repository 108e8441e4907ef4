"""`--model net.onnx`: a file is a model with its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

from fxprune.cli import app

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.Flatten(), nn.Linear(16 * 36, 4)
    ).eval()
    torch.onnx.export(net, (torch.randn(1, 3, 16, 16),), "net.onnx", input_names=["image"], verbose=False)
    np.save("images.npy", RNG.random((96, 3, 16, 16), dtype=np.float32))
    return tmp_path


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*words])
    return result.exit_code, " ".join(result.output.split())


def test_prune_and_what_comes_after(folder: Path) -> None:
    data = ("--data", "images.npy", "--mean", ".5,.5,.5", "--std", ".25,.25,.25")
    code, said = run("prune", "--model", "net.onnx", *data, "--method", "magnitude", "--out", "run")
    assert code == 0, said
    assert "2 of 3 layers pruned to 2:4" in said
    written = onnx.load("run/model.onnx").graph
    assert written.input[0].name == "image"
    code, said = run("diff", "run")
    assert code == 0, said
    assert "pruned to 2:4" in said
    assert run("diff", "net.onnx", "run/model.onnx")[0] == 0
    assert run("export", "run/pruned.pt", "--out", "again.onnx")[0] == 0
    assert onnx.load("again.onnx").graph.input[0].name == "image"


def test_low_rank_and_scan(folder: Path) -> None:
    data = ("--model", "net.onnx", "--data", "images.npy", "--mean", ".5,.5,.5", "--std", ".25,.25,.25")
    code, said = run("low-rank", *data, "--rank", "ratio:0.5", "--out", "lower", "--no-onnx")
    assert code == 0, said
    code, said = run("scan", *data, "--method", "magnitude", "--recipe", "2:4", "--out", "scanned")
    assert code == 0, said
    assert (folder / "scanned" / "scan.csv").is_file()


def test_what_makes_no_sense_beside_a_file(folder: Path) -> None:
    data = ("--data", "images.npy", "--mean", ".5,.5,.5", "--std", ".25,.25,.25", "--out", "run")
    code, said = run("prune", "--model", "net.onnx", "--weights", "net.pt", *data)
    assert code == 1
    assert "whole model with its weights; leave weights out" in said
    code, said = run("prune", "--model", "none.onnx", *data)
    assert code == 1
    assert "cannot read none.onnx" in said


def test_a_file_with_its_channels_last(folder: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), helper.make_node("Conv", ["t", "w"], ["y"])],
        "last",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, 16, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(RNG.random((4, 3, 1, 1), dtype=np.float32), "w")],
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "last.onnx")
    code, said = run("prune", "--model", "last.onnx", "--data", "images.npy", "--out", "run")
    assert code == 1
    assert "channels last" in said
    assert "--inputs-as-nchw x" in said
