"""fxprune low-rank: a trained model in; one with smaller dense layers, its ONNX file, reports and a run folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxprune.cli.command import Group, stderr
from fxprune.cli.compression import compress
from fxprune.cli.parameters import (
    ONNX_FILE,
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

# Steps of pruning that rank reduction does not have.
SOLVER = Group("Solver", left_out=("permute", "global_budget", "polish"))


def low_rank(
    task: Annotated[Task, TASK],
    options: Annotated[Options, SOLVER],
    onnx_options: Annotated[OnnxOptions, ONNX_FILE],
    config: dict[str, Any],
    *,
    rank: Annotated[
        str,
        typer.Option(
            help="macs:0.7 (keep 70% of them), ratio:0.5 (of each layer), energy:0.95 (of each output's "
            "variance), or speedup:1.3 (measured in onnxruntime)."
        ),
    ] = "macs:0.7",
    method: Annotated[
        Literal["data_aware", "svd"], typer.Option(help="data_aware (least output error), or svd of the weights.")
    ] = "data_aware",
    split: Annotated[
        Literal["auto", "channel", "spatial"],
        typer.Option(help="channel (k x k, then 1 x 1), spatial (k x 1, then 1 x k), or auto: what errs less."),
    ] = "auto",
    multiple: Annotated[
        int | None, typer.Option(min=1, help="Ranks are multiples of it; 16 for speedup, else 4, by default.")
    ] = None,
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
    """Replace layers by two smaller dense ones each, which runs faster on any machine; score and export the result.

    The data may be a labelled data set, a folder of pictures, or an .npz or .npy file.
    """
    import fxprune
    from fxprune.ranks.plan import RankRule

    limit = in_bytes(memory_limit)
    RankRule.parse(rank)  # a misspelt rule must not cost a dense evaluation first
    name = f"{model_name(task.model)}-{data_name(task.data)}-{file_name(rank)}-{method}"
    compress(
        "low-rank",
        task,
        lambda model, images, place: fxprune.low_rank(
            model, images, rank, method=method, split=split, multiple=multiple, exclude=tuple(exclude or ()),
            device=place, options=options, progress=stderr.is_terminal, memory_limit=limit,
            checkpoint_dir=checkpoint_dir,
        ),
        config=config, folder=out or Path("out", "low-rank", name), calibration_images=calibration_images,
        batch_size=batch_size, seed=options.seed, test_images=test_images, register=register,
        onnx=onnx_options if onnx else None, device=device, overwrite=overwrite,
    )  # fmt: skip
