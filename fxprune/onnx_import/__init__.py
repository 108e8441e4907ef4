"""ONNX files as models: a file's operators become modules and functions of torch in one graph.

`read` loads and folds a file, `importer` walks its nodes, and the files of operators hold one builder for each operator, which
`table` finds by name. Every value is followed at several sizes at once (`values`), without computing anything: so shapes that
a file computes become numbers, and a batch size that it fixes is found and opened again (`batch`).
"""

from __future__ import annotations

from fxprune.onnx_import.importer import import_onnx, is_onnx

__all__ = ["import_onnx", "is_onnx"]
