from __future__ import annotations

import runpy
from pathlib import Path

import onnxruntime
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "onnx_file.py"


def test_the_file_that_comes_out_has_the_ports_of_the_one_that_went_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLE))["main"](folder=tmp_path)
    assert "classifier.0" in capsys.readouterr().out
    for name in ("theirs.onnx", "pruned.onnx"):
        session = onnxruntime.InferenceSession(str(tmp_path / name))
        ports = [port.name for port in (*session.get_inputs(), *session.get_outputs())]
        assert ports == ["image", "scores"]
