"""fxprune prune: a trained model in; pruned weights, a validated ONNX file, reports and a run folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.command import stderr
from fxprune.cli.compression import compress
from fxprune.cli.parameters import (
    ONNX_FILE,
    SOLVER,
    TASK,
    BatchSize,
    CalibrationImages,
    Device,
    Exclude,
    OnnxOptions,
    Out,
    Overwrite,
    Register,
    TestImages,
    WriteOnnx,
    data_name,
    model_name,
)  # fmt: skip
from fxprune.experiments.tasks import Task
from fxprune.options import Options


def prune(
    task: Annotated[Task, TASK],
    options: Annotated[Options, SOLVER],
    onnx_options: Annotated[OnnxOptions, ONNX_FILE],
    config: dict[str, Any],
    *,
    pattern: Annotated[str, typer.Option(help='"2:4" and the like, or a sparsity such as 0.9.')] = "2:4",
    method: Annotated[str, typer.Option(help="admm, sparsegpt, exact_obs, magnitude, or one of your own.")] = "admm",
    exclude: Exclude = None,
    calibration_images: CalibrationImages = 1024,
    out: Out = None,
    overwrite: Overwrite = False,
    test_images: TestImages = None,
    register: Register = None,
    onnx: WriteOnnx = True,
    batch_size: BatchSize = 128,
    device: Device = None,
) -> None:
    """Prune a trained model in one shot, score it, and export it to a validated ONNX file.

    The data may be a labelled data set, a folder of pictures, or an .npz or .npy file; without labels the result is scored by
    its agreement with the dense model alone.
    """
    from fxprune import solvers
    from fxprune.compiler import compile
    from fxprune.experiments.tasks import import_user_code
    from fxprune.pattern import Pattern

    pattern = str(Pattern.parse(pattern))
    import_user_code(register or ())
    solvers.get(method)  # a misspelt name must not cost a dense evaluation first
    name = f"{model_name(task.model)}-{data_name(task.data)}-{pattern.replace(':', '-')}-{method}"
    compress(
        "prune",
        task,
        lambda model, images, place: compile(
            model, images, pattern, method=method, exclude=tuple(exclude or ()), device=place, options=options,
            progress=stderr.is_terminal,
        ),
        config=config, folder=out or Path("out", "prune", name), calibration_images=calibration_images,
        batch_size=batch_size, seed=options.seed, test_images=test_images, register=register,
        onnx=onnx_options if onnx else None, device=device, overwrite=overwrite,
    )  # fmt: skip
