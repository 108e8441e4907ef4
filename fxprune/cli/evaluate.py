"""fxprune evaluate: scores a weights file, a pruned graph or an ONNX file, by the same code on the same images.

Accuracy needs labels; agreement with another file does not.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxprune.cli.command import Group, fail, stderr, stdout, working
from fxprune.cli.parameters import DATA, BatchSize, Device, Register, TestImages
from fxprune.errors import CheckpointError, DataError, ModelError
from fxprune.experiments.tasks import (
    Task,
    import_user_code,
    module_classes,
    number_of_images,
    scoring_loader,
    task_from,
)

if TYPE_CHECKING:  # imported when a command starts
    import torch
    from torch import nn
    from torch.utils.data import Dataset

    from fxprune.data import DataSplits

# The file holds the weights.
TASK = Group(DATA, everyday=("model", "data"), left_out=("weights", "pretrained"))


def evaluate(
    file: Annotated[Path, typer.Argument(help="pruned.pt, a weights file (with --model), or an .onnx file.")],
    task: Annotated[Task, TASK],
    *,
    against: Annotated[
        Path | None, typer.Option(help="Another such file, as a rule the dense model's: measure agreement with it.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the figures to this file too.")] = None,
    test_images: TestImages = None,
    register: Register = None,
    batch_size: BatchSize = 256,
    device: Device = None,
) -> None:
    """Score a file on a data set's test images, or with --against on pictures without labels.

    What is not given is taken from the config.yaml beside the file, where fxprune train, prune or low-rank made it. The exit
    code is 1 where guessing would have done as well: most likely the data set is not the model's.
    """
    from fxprune.experiments.evaluation import agreement, score
    from fxprune.files import atomic
    from fxprune.runtime.devices import default_device

    place = default_device(device)
    task, made = filled(task, file)
    import_user_code(register or ())
    task = _with_user_code(task, made, file)
    with working(f"reading {task.data}"):
        splits = task.load_data(labelled=False)
    if against is None and not splits.labelled:
        raise DataError(
            f"{task.data} holds no labels, which accuracy needs; --against another file, as a rule the dense model's, measures "
            "the agreement of the two. A folder with labels has train/ and test/, each with one subfolder a class"
        )
    test = scoring_loader(
        splits,
        images=test_images or made.get("test_images"),
        batch_size=batch_size,
        unsplit=_not_calibrated_on(splits, task, made) if splits.test is None else None,
    )
    model = open_model(file, task, splits.info.num_classes, place)
    found = None
    if splits.labelled:
        with working(f"scoring {file}"):
            found = score(model, test)
    count = number_of_images(test)
    figures: dict[str, Any] = {"file": str(file), "data": task.data, "images": count}
    if found is not None:
        figures["accuracy"] = found.accuracy
    if against is not None:
        with working(f"comparing with {against}"):
            other = open_model(against, task, splits.info.num_classes, place)
            close = agreement(other, model, test, are_classifiers=splits.labelled)
        figures |= {"against": str(against), "agreement": close.top1, "kl": close.kl}
    if json_file is not None:
        with atomic(json_file) as part:
            part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if found is not None:
        stdout.print(f"{file}: {found.accuracy:.2f}% of {count} test images of {task.data}", soft_wrap=True)
    if against is not None:
        where = "" if found is not None else f" of {count} images of {task.data}, which has no labels"
        stdout.print(
            f"{file if found is None else ''} agrees with {against} on {close.top1:.2%}{where}, KL {close.kl:.4f}".strip(),
            soft_wrap=True,
        )
    if found is not None and found.says_nothing:
        fail(
            f"{found.accuracy:.2f}% is no better than guessing ({found.guessing:.2f}%). Is {task.data} the data set that the "
            "model was trained on, with the same order of classes, mean and std?"
        )


def _not_calibrated_on(splits: DataSplits, task: Task, made: dict[str, Any]) -> Dataset[Any]:
    """Images that are not split, without those that the run which made the file was calibrated on, where others are left."""
    from fxprune.data import calibration_split

    images, count = splits.train, made.get("calibration_images", 0)
    if made.get("data") != task.data or not 0 < count < len(images):  # type: ignore[arg-type]
        return images
    return calibration_split(images, count, made.get("seed", 0), balanced=splits.labelled)[1]


def filled(task: Task, file: Path) -> tuple[Task, dict[str, Any]]:
    """The task with what is not given taken from the run folder that the file lies in, and that folder's options."""
    from fxprune.experiments.runs import CONFIG
    from fxprune.experiments.yaml_files import read_yaml

    config = file.parent / CONFIG
    if not config.is_file():
        return task, {}
    made = read_yaml(config)
    then, default = task_from(made), Task()
    found = {
        name: value
        for name, value in dataclasses.asdict(then).items()
        if name not in TASK.left_out and getattr(task, name) == getattr(default, name) != value
    }
    if found:
        stderr.print(f"from {config}: {', '.join(f'{name} {value}' for name, value in found.items())}", soft_wrap=True)
    return dataclasses.replace(task, **found), made


def _with_user_code(task: Task, made: dict[str, Any], file: Path) -> Task:
    """The task, with the code imported that its run registered; without the model, where that is no longer there.

    A pruned graph needs neither: how its images are normalised is in the run's record.
    """
    from fxprune.experiments.runs import read_record

    try:
        import_user_code(made.get("register") or ())
    except ModelError as error:
        try:
            found = read_record(file.parent)["results"]
        except DataError:
            raise error from None
        if task.model != made.get("model") or not found.get("mean"):
            raise
        stderr.print(f"without the code of {task.model}: {error}", markup=False, soft_wrap=True)
        side = found["input_shape"][1] if task.data is not None and Path(task.data).is_dir() else None
        return dataclasses.replace(
            task,
            model=None,
            mean=task.mean or tuple(found["mean"]),
            std=task.std or tuple(found["std"]),
            image_size=task.image_size or side,
        )
    return task


def open_model(file: Path, task: Task, num_classes: int, place: torch.device) -> nn.Module:
    """The model in a file of any kind: fxprune.save's, weights of the task's model, or ONNX.

    Raises:
        ModelError: weights alone, and the task names no model.
        FxPruneError: the file cannot be read.
    """
    from fxprune.experiments.checkpoints import load_weights
    from fxprune.export.onnx_module import OnnxModule
    from fxprune.saving import is_saved, load

    if file.suffix == ".onnx":
        return OnnxModule(file)
    if is_saved(file):
        try:
            return load(file).to(place)
        except CheckpointError:
            if task.model is None:
                raise
            # It may name classes of the user's own.
            return load(file, allow=module_classes(task.new_model(num_classes))).to(place)
    if task.model is None:
        raise ModelError(f"{file} holds weights alone: name the model that they belong to (--model)")
    return load_weights(task.new_model(num_classes), file).to(place)
