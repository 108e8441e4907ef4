"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxprune.cli.command import Group

DATA = "Model and data"
RUNNING = "Running"
TASK = Group(DATA, everyday=("model", "data", "weights"))
SOLVER = Group("Solver")
ONNX_FILE = Group("ONNX file")

Register = Annotated[
    list[str] | None,
    typer.Option(help="Module or .py file that registers models or solvers of your own.", rich_help_panel=DATA),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch.", rich_help_panel=RUNNING)]
TestImages = Annotated[
    int | None, typer.Option(min=1, help="Score on the first so many test images only.", rich_help_panel=DATA)
]
CalibrationImages = Annotated[int, typer.Option(min=1, help="Images to calibrate on; no label of theirs is read.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Layer to leave as it is: a name or pattern; once for each.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1; a GPU where there is one by default.", rich_help_panel=RUNNING),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the results; one under out/ by default.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that --out holds: remove what it wrote, and nothing else.")
]
WriteOnnx = Annotated[
    bool, typer.Option(help="Write an ONNX file and validate it in onnxruntime.", rich_help_panel=ONNX_FILE.title)
]


@dataclass(frozen=True)
class OnnxOptions:
    """How the ONNX file is written; the fields are arguments of `fxprune.export_onnx`.

    Attributes:
        opset: ONNX operator set version; the exporter's own choice by default.
        precision: of weights and activations; inputs and outputs stay fp32.
        sparse_initializers: store weights sparsely where that takes fewer bytes; few engines beside onnxruntime read it.
        dynamic_size: leave height and width open, as the batch size is.
        input_names: of the inputs, in their order; once for each. The model's own by default.
        output_names: likewise.
    """

    opset: int | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    sparse_initializers: bool = False
    dynamic_size: bool = False
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of `export_onnx`: those that differ from its own defaults."""
        values = dataclasses.asdict(self)
        return {
            field.name: values[field.name] for field in dataclasses.fields(self) if values[field.name] != field.default
        }


def data_name(data: str | None) -> str:
    """A data set's name or path as part of a folder's name."""
    return Path(data or "data").stem


def model_name(model: str | None) -> str:
    """A model's name as part of a folder's name: of nets/mynet.py:MyNet, MyNet."""
    return (model or "model").rpartition(":")[2].replace("/", "-")
