"""A model and a data set that fit each other, by name: what is trained, pruned, scored or benchmarked."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset

from fxprune.data import DataSplits, load_data, make_loader
from fxprune.errors import DataError, ModelError, OptionsError
from fxprune.experiments.checkpoints import load_weights
from fxprune.models import create, model_info


@dataclass(frozen=True)
class Task:
    """Names of a model, its weights and its data. None means: as the model or the data set has it.

    Attributes:
        model: simple_cnn, cifar_cnn, resnet20, vgg16_cifar, any of torchvision's, timm/..., or one of your own.
        data: digits, mnist, fashion_mnist, cifar10, cifar100, an .npz file, or a folder with train/ and test/.
        weights: file with the model's trained weights.
        pretrained: download the weights that torchvision or timm publish for the model.
        num_classes: width of the output, where it is not the data set's number of classes.
        in_channels: input channels of the model, where they are not its usual ones.
        image_size: side to resize images to; a folder of images takes the model's.
        mean: per channel, of images scaled to [0, 1]; once for each channel. The model's by default.
        std: per channel, same scale; likewise.
        root: folder of torchvision's data files.
        download: download a named data set that is not there.
    """

    model: str | None = None
    data: str | None = None
    weights: str | None = None
    pretrained: bool = False
    num_classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    root: str | None = None
    download: bool = False

    def load_data(self, *, augment: bool = False) -> DataSplits:
        """Load the data set, normalised as the model has it.

        Raises:
            DataError, UnknownModelError: as `load_data` and `model_info`.
        """
        if self.data is None:
            raise DataError("no data set is named (data); `digits` is there after every installation of fxprune[demo]")
        mean, std, side = self.mean, self.std, self.image_size
        if self.model is not None:
            info = model_info(self.model)
            # The figures that a model is published with say nothing about one with other channels.
            if mean is None and std is None and self.in_channels in (None, info.input_shape[0]):
                mean, std = info.mean, info.std
            if side is None and Path(self.data).is_dir():
                side = info.input_shape[1]
        return load_data(
            self.data, mean=mean, std=std, image_size=side, augment=augment, root=self.root, download=self.download
        )

    def new_model(self, num_classes: int) -> nn.Module:
        """Build the model, untrained unless `pretrained`; `num_classes` counts where the task names no other."""
        if self.model is None:
            raise ModelError("no model is named (model); simple_cnn and resnet20 are two of many")
        given: dict[str, Any] = {}
        if self.pretrained:
            given = {"pretrained": True} if self.model.startswith("timm/") else {"weights": "DEFAULT"}
        return create(self.model, num_classes=self.num_classes or num_classes, in_channels=self.in_channels, **given)

    def trained_model(self, num_classes: int) -> nn.Module:
        """Build the model with its weights, in eval mode.

        Raises:
            ModelError: the task names neither weights nor `pretrained`.
            CheckpointError: the weights do not fit.
        """
        if self.weights is None and not self.pretrained:
            raise ModelError(
                f"{self.model} has no weights: name a file (weights), or take the published ones (pretrained), "
                "where torchvision or timm have the model"
            )
        if self.weights is not None and self.pretrained:
            raise ModelError(f"{self.model}: weights ({self.weights}) and pretrained exclude each other")
        model = self.new_model(num_classes)
        if self.weights is not None:
            load_weights(model, self.weights)
        return model.eval()


def task_from(config: Mapping[str, Any]) -> Task:
    """The task that a command's options describe, such as those in a run folder; its other options are left aside."""
    found = {field.name: config[field.name] for field in dataclasses.fields(Task) if field.name in config}
    found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return Task(**found)


def module_classes(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes of a model's modules: what its saved graph may name beside torch's own (see `fxprune.save`)."""
    return tuple({type(module) for module in model.modules()})


def scoring_loader(splits: DataSplits, *, images: int | None = None, batch_size: int = 256) -> DataLoader[Any]:
    """Batches of the test split, of its first `images` where given.

    Raises:
        OptionsError: `images` is below 1.
    """
    if images is None:
        return make_loader(splits.test, batch_size=batch_size)
    if images < 1:
        raise OptionsError(f"test_images is {images}; it must be at least 1")
    count = min(images, len(splits.test))  # type: ignore[arg-type]
    return make_loader(Subset(splits.test, range(count)), batch_size=batch_size)


def import_user_code(names: Sequence[str]) -> None:
    """Import modules or files that register models of the user's own (or solvers).

    Args:
        names: module names, or paths that end in .py.

    Raises:
        ModelError: one cannot be imported.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                path = Path(name)
                spec = importlib.util.spec_from_file_location(path.stem, path)
                if spec is None or spec.loader is None:
                    raise ImportError("no Python file")
                module = importlib.util.module_from_spec(spec)
                sys.modules[path.stem] = module  # dataclasses and pickle look a class's module up here
                spec.loader.exec_module(module)
            else:
                importlib.import_module(name)
        except (ImportError, OSError, SyntaxError) as error:
            raise ModelError(f"cannot import {name!r}, which should register models: {error}") from error
