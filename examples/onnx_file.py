"""Prune an ONNX file of which there is no PyTorch model, and write an ONNX file with the same inputs and outputs.

    python examples/onnx_file.py [FILE.onnx]

Without a file, one is made first: a small MobileNet of torchvision's with random weights, for one image of 64 x 64. Its images
are random too; for a file of yours give real ones, preprocessed as for inference.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import onnx
import torch
import torchvision

import fxprune


def main(path: str | None = None, folder: Path = Path("out/onnx_file")) -> None:
    """Prune a file; the result goes into `folder`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    if path is None:
        path = str(folder / "theirs.onnx")
        someone_elses_file(path)

    # What the file takes; sizes that it leaves open are 64 here, and its batch size may be any.
    (given,) = onnx.load(path, load_external_data=False).graph.input
    sizes = [d.dim_value or (3 if i == 1 else 64) for i, d in enumerate(given.type.tensor_type.shape.dim)]
    images = torch.randn(128, *sizes[1:]).split(32)

    compiled = fxprune.compile(path, images, "2:4", method="sparsegpt", progress=False)
    print(compiled.report)

    # The file is kept only if onnxruntime computes what the pruned graph does.
    report = fxprune.export_onnx(compiled, folder / "pruned.onnx", images[0])
    print(f"\n{report.summary}")
    print(f"\nin:  {', '.join(report.inputs)}\nout: {', '.join(report.outputs)}")
    print(f"\n{fxprune.diff(path, folder / 'pruned.onnx').costs_after}")


def someone_elses_file(path: str) -> None:
    """A file as torch's older exporter writes it by default, its batch size fixed."""
    net = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.randn(1, 3, 64, 64),), path, dynamo=False, input_names=["image"], output_names=["scores"]
        )


if __name__ == "__main__":
    main(*sys.argv[1:2])
