"""fxprune prune: a trained model in; pruned weights, a validated ONNX file, reports and a run folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.command import stderr
from fxprune.cli.compression import compress, one_graph
from fxprune.cli.parameters import (
    ONNX_FILE,
    SOLVER,
    TASK,
    BatchSize,
    CalibrationImages,
    CheckpointDir,
    Device,
    Exclude,
    MemoryLimit,
    OnnxOptions,
    Out,
    Overwrite,
    Pattern,
    Register,
    TestImages,
    WriteOnnx,
    data_name,
    in_bytes,
    model_name,
)  # fmt: skip
from fxprune.experiments.recipe_texts import file_name
from fxprune.experiments.tasks import Task
from fxprune.options import Options


def prune(
    task: Annotated[Task, TASK],
    options: Annotated[Options, SOLVER],
    onnx_options: Annotated[OnnxOptions, ONNX_FILE],
    config: dict[str, Any],
    *,
    pattern: Pattern = "2:4",
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
    memory_limit: MemoryLimit = None,
    checkpoint_dir: CheckpointDir = None,
) -> None:
    """Prune a trained model in one shot, score it, and export it to a validated ONNX file.

    The data may be a labelled data set, a folder of pictures, or an .npz or .npy file; without labels the result is scored by
    its agreement with the dense model alone.
    """
    from fxprune import solvers
    from fxprune.compiler import compile
    from fxprune.experiments.tasks import import_user_code
    from fxprune.recipe import Recipe

    limit = in_bytes(memory_limit)
    recipe = Recipe.parse(pattern)
    import_user_code(register or ())
    solver = solvers.get(method)  # a misspelt name must not cost a dense evaluation first
    options.resolved(solver, recipe)
    name = f"{model_name(task.model)}-{data_name(task.data)}-{file_name(pattern)}-{method}"
    compress(
        "prune",
        task,
        lambda model, images, place: one_graph(
            compile(
                model, images, recipe, method=method, exclude=tuple(exclude or ()), device=place, options=options,
                progress=stderr.is_terminal, memory_limit=limit, checkpoint_dir=checkpoint_dir,
            )
        ),
        config=config, folder=out or Path("out", "prune", name), calibration_images=calibration_images,
        batch_size=batch_size, seed=options.seed, test_images=test_images, register=register,
        onnx=onnx_options if onnx else None, device=device, overwrite=overwrite,
    )  # fmt: skip
