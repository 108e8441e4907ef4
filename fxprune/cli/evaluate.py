"""fxprune evaluate: scores a weights file, a pruned graph or an ONNX file, by the same code on the same images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from fxprune.cli.command import stderr, stdout
from fxprune.cli.parameters import TASK, BatchSize, Device, Register, TestImages
from fxprune.data import DataSplits
from fxprune.devices import default_device
from fxprune.errors import ModelError
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.evaluation import agreement
from fxprune.experiments.evaluation import evaluate as accuracy_of
from fxprune.experiments.runs import CONFIG
from fxprune.experiments.tasks import Task, import_user_code, module_classes, scoring_loader, task_from
from fxprune.experiments.yaml_files import read_yaml
from fxprune.files import atomic
from fxprune.onnx_module import OnnxModule
from fxprune.saving import is_saved, load

# Options of a task that make no sense here: the file holds the weights.
LEFT_OUT = ("weights", "pretrained")


def evaluate(
    file: Annotated[Path, typer.Argument(help="pruned.pt, a weights file (with --model), or an .onnx file.")],
    task: Annotated[Task, TASK, LEFT_OUT],
    *,
    against: Annotated[
        Path | None, typer.Option(help="Another such file, as a rule the dense model's: measure agreement with it.")
    ] = None,
    batch_size: BatchSize = 256,
    test_images: TestImages = None,
    register: Register = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the figures to this file too.")] = None,
) -> None:
    """Score a file on a data set's test images.

    What is not given is taken from the config.yaml beside the file, where `fxprune train` or `fxprune prune` made it.
    """
    task, made = _filled(task, file)
    import_user_code([*(register or ()), *(made.get("register") or ())])
    splits = task.load_data()
    test = scoring_loader(splits, images=test_images or made.get("test_images"), batch_size=batch_size)
    place = default_device(device)
    model = _open(file, task, splits, place)
    images = len(test.dataset)  # type: ignore[arg-type]
    with stderr.status(f"scoring {file}"):
        figures: dict[str, Any] = {
            "file": str(file),
            "data": task.data,
            "images": images,
            "accuracy": accuracy_of(model, test),
        }
    if against is not None:
        with stderr.status(f"comparing with {against}"):
            close = agreement(_open(against, task, splits, place), model, test)
        figures |= {"against": str(against), "agreement": close.top1, "kl": close.kl}
    if json_file is not None:
        with atomic(json_file) as part:
            part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    stdout.print(f"{file}: {figures['accuracy']:.2f}% of {images} test images of {task.data}", soft_wrap=True)
    if against is not None:
        stdout.print(f"agrees with {against} on {figures['agreement']:.2f}%, KL {figures['kl']:.4f}", soft_wrap=True)


def _filled(task: Task, file: Path) -> tuple[Task, dict[str, Any]]:
    """The task with what is not given taken from the run folder that the file lies in, and that folder's options."""
    config = file.parent / CONFIG
    if not config.is_file():
        return task, {}
    made = read_yaml(config)
    then, default = task_from(made), Task()
    found = {
        name: value
        for name, value in dataclasses.asdict(then).items()
        if name not in LEFT_OUT and getattr(task, name) == getattr(default, name) != value
    }
    if found:
        stderr.print(f"from {config}: {', '.join(f'{name} {value}' for name, value in found.items())}", soft_wrap=True)
    return dataclasses.replace(task, **found), made


def _open(file: Path, task: Task, splits: DataSplits, place: torch.device) -> nn.Module:
    """The model in a file; on `place`, but for ONNX files, which run on the CPU."""
    if file.suffix == ".onnx":
        return OnnxModule(file)
    if is_saved(file):
        own = module_classes(task.new_model(splits.info.num_classes)) if task.model else ()
        return load(file, allow=own).to(place)
    if task.model is None:
        raise ModelError(f"{file} holds weights alone: name the model that they belong to (--model)")
    return load_weights(task.new_model(splits.info.num_classes), file).to(place)
