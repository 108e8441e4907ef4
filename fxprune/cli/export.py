"""fxprune export: a pruned model, or weights of a model, as an ONNX file that onnxruntime has confirmed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxprune.cli.command import Group, stdout, working
from fxprune.cli.evaluate import filled, open_model
from fxprune.cli.parameters import DATA, ONNX_FILE, OnnxOptions, Register
from fxprune.cli.run_folder import input_shape as shape_of_run
from fxprune.errors import DataError, ModelError, OptionsError
from fxprune.experiments.tasks import Task, import_user_code, scoring_loader

if TYPE_CHECKING:
    from torch import Tensor, nn

TASK = Group(DATA, left_out=("weights", "pretrained"))
EXAMPLES = 4  # images that the file is checked with


def export(
    file: Annotated[Path, typer.Argument(help="pruned.pt, or a weights file (with --model).")],
    task: Annotated[Task, TASK],
    onnx_options: Annotated[OnnxOptions, ONNX_FILE],
    *,
    out: Annotated[
        Path | None, typer.Option(help="The ONNX file; beside the file and with its name by default.")
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            metavar="C,H,W",
            help="Size of one input, such as 3,224,224; by default as the file, its run folder or model has it.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write what was found as JSON.")] = None,
    register: Register = None,
) -> None:
    """Write a pruned model to an ONNX file, which is kept only if onnxruntime gives what the model gives.

    It is checked on random images; with --data on the test images of a data set, and accuracy is measured both ways.
    """
    import torch

    from fxprune.export import export_onnx
    from fxprune.files import atomic

    if file.suffix == ".onnx":
        raise OptionsError(f"{file} is an ONNX file already; fxprune inspect shows what it holds")
    path = out or file.with_suffix(".onnx")
    if path.suffix != ".onnx":
        raise OptionsError(f"--out {path}: name a file that ends in .onnx")
    known, made = filled(Task() if task == Task() else task, file)
    import_user_code([*(register or ()), *(made.get("register") or ())])
    if task.data is None:
        model, loader = open_model(file, known, known.num_classes or 0, torch.device("cpu")), None
        examples = (_calibrated_on(model) if input_shape is None else ()) or (
            torch.randn(EXAMPLES, *_shape(input_shape, file, known), generator=torch.Generator().manual_seed(0)),
        )
    else:
        splits = known.load_data()
        model = open_model(file, known, splits.info.num_classes, torch.device("cpu"))
        loader = scoring_loader(splits)
        examples = (next(iter(loader))[0][:EXAMPLES],)
    path.parent.mkdir(parents=True, exist_ok=True)
    with working(f"writing {path} and validating it"):
        report = export_onnx(model, path, examples, loader=loader, **onnx_options.arguments())
    if json_file is not None:
        with atomic(json_file) as part:
            report.to_json(part)
    stdout.out(report.render(color=stdout.is_terminal), highlight=False)
    stdout.print(f"\n{path}", soft_wrap=True)


def _calibrated_on(model: nn.Module) -> tuple[Tensor, ...]:
    """Random inputs of the form that the model was calibrated on, integers all 0; () of a file that does not say."""
    import torch

    from fxprune.annotations import graph_annotation

    generator = torch.Generator().manual_seed(0)
    found = []
    for form in graph_annotation(model).inputs:
        dtype = getattr(torch, form.dtype)
        is_float = dtype.is_floating_point
        found.append(
            torch.randn(form.shape, generator=generator).to(dtype) if is_float else torch.zeros(form.shape, dtype=dtype)
        )
    return tuple(found)


def _shape(given: str | None, file: Path, task: Task) -> tuple[int, ...]:
    """Of one input: as given, else as the file's run folder has it, else the model's own."""
    from fxprune.models import model_info

    if given is not None:
        try:
            shape = tuple(int(part) for part in given.replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise OptionsError(f"--input-shape {given}: write the sizes of one input, such as 3,224,224")
        return shape
    try:
        return shape_of_run(file.parent)
    except (DataError, ModelError, OptionsError):
        pass
    try:
        channels, height, width = model_info(task.model or "").input_shape
    except ModelError as error:
        raise OptionsError(
            f"nothing says how large an input of {file} is: give --input-shape, such as 3,224,224"
        ) from error
    return task.in_channels or channels, task.image_size or height, task.image_size or width
