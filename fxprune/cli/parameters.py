"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxprune.cli.command import RECIPE, Group
from fxprune.errors import OptionsError
from fxprune.experiments.recipe_texts import RecipeText

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
Pattern = Annotated[
    RecipeText,
    typer.Option(
        metavar=RECIPE,
        help="2:4 and the like, a sparsity such as 0.9, mixed:0.6, rank:0.7, rank:0.7+2:4, or dense; or LAYER=RECIPE, once "
        "for each name or pattern, of which the first that matches a layer counts.",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Calibration values to hold on the device (in memory, on a CPU), such as 4GB or 512MiB; a share of what is free "
        "by default.",
        rich_help_panel=RUNNING,
    ),
]
CheckpointDir = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Folder that keeps finished layers; an interrupted run goes on from there.",
        rich_help_panel=RUNNING,
    ),
]
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


def in_bytes(size: str | None) -> int | None:
    """Read a size such as 4GB (10^9 bytes), 512MiB (2^20), 1.5g or a plain number of bytes.

    Raises:
        OptionsError: it is no positive size.
    """
    if size is None:
        return None
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt])(i?))?b?", size.strip().lower())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    base = 1024 if match and match[3] else 1000
    found = int(number * base ** (1 + "kmgt".index(match[2]) if match and match[2] else 0))
    if found < 1:
        raise OptionsError(f"--memory-limit {size}: write a size such as 4GB or 512MiB, or a number of bytes")
    return found


def data_name(data: str | None) -> str:
    """A data set's name or path as part of a folder's name."""
    return Path(data or "data").stem


def model_name(model: str | None) -> str:
    """A model's name as part of a folder's name: of nets/mynet.py:MyNet, MyNet; of files/net.onnx, net."""
    if model is not None and model.endswith(".onnx"):
        return Path(model).stem
    return (model or "model").rpartition(":")[2].replace("/", "-")
