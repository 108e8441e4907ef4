"""A model and a data set that fit each other, by name: what is trained, pruned, scored or benchmarked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.errors import DataError, ModelError, OptionsError

if TYPE_CHECKING:  # the commands' help shows a task's fields, and must not wait for torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from fxprune.data import DataSplits

SCORED = 1024  # Images without labels that a model is scored on, where there are more.


@dataclass(frozen=True)
class Task:
    """Names of a model, its weights and its data. None means: as the model or the data set has it.

    Attributes:
        model: name, such as simple_cnn, resnet20, any of torchvision's, timm/...; or a class of your own as
            mynet.py:MyNet or package.module:MyNet; or an ONNX file, which brings its weights.
        data: name (digits, mnist, fashion_mnist, cifar10, cifar100); or a folder with train/ and test/ (or val/), one
            subfolder a class; or an .npz file with train_images, train_labels, test_images and test_labels, or a pair of JPEG
            files ..._train.npz and ..._test.npz; or, where no labels are needed, a folder of pictures, however deep, an .npy
            file of images, or an .npz file that holds some.
        weights: file with the model's trained weights.
        pretrained: download the weights that torchvision or timm publish for the model; a class or function of your own
            brings its weights itself.
        num_classes: width of the output, where it is not the data set's number of classes.
        in_channels: input channels of the model, where they are not its usual ones.
        image_size: side to resize images to; a folder of images takes the model's.
        mean: per channel, of images scaled to [0, 1]; such as .485,.456,.406. The model's by default.
        std: per channel, same scale; likewise.
        root: folder of torchvision's data files.
        download: download a named data set that is not there.
        model_args: what your own class or function is called with, such as width=32; once for each argument.
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
    model_args: Mapping[str, Any] | None = None

    def load_data(self, *, augment: bool = False, labelled: bool = True) -> DataSplits:
        """Load the data set, normalised as the model has it; images without labels too, where none are needed.

        Raises:
            DataError, UnknownModelError: as `load_data` and `model_info`.
        """
        from fxprune.data import load_data
        from fxprune.models import model_info
        from fxprune.models.user_code import is_own

        if self.model is not None and is_file(self.model):
            return self._loaded_for_file(self.model, augment=augment, labelled=labelled)
        if self.data is None:
            raise DataError(
                "no data set is named (--data); `digits` is there after every installation of fxprune[demo]"
            )
        mean, std, side = self.mean, self.std, self.image_size
        if self.model is not None and not is_own(self.model):
            info = model_info(self.model)
            # The figures that a model is published with say nothing about one with other channels.
            if mean is None and std is None and self.in_channels in (None, info.input_shape[0]):
                mean, std = info.mean, info.std
            if side is None and Path(self.data).is_dir():
                side = info.input_shape[1]
        return load_data(
            self.data, mean=mean, std=std, image_size=side, augment=augment, root=self.root, download=self.download,
            labelled=labelled,
        )  # fmt: skip

    def _loaded_for_file(self, model: str, *, augment: bool, labelled: bool) -> DataSplits:
        """The data set for an ONNX file, which says how large its images are, and nothing of how they are normalised."""
        from fxprune.onnx_import.images import image_input

        found = image_input(model)
        side = self.image_size
        if side is None and self.data is not None and Path(self.data).is_dir():
            side = found.height
        return dataclasses.replace(self, model=None, image_size=side).load_data(augment=augment, labelled=labelled)

    def new_model(self, num_classes: int) -> nn.Module:
        """Build the model, untrained unless `pretrained`.

        Args:
            num_classes: of the data; counts where the task names no other. 0 leaves it to the model.
        """
        from fxprune.models import create
        from fxprune.models.user_code import is_own, takes

        if self.model is not None and is_file(self.model):
            return self._imported(self.model)
        if self.model is None:
            raise ModelError("no model is named (--model); simple_cnn, resnet20 and mynet.py:MyNet are three of many")
        given = dict(self.model_args or {})
        own = is_own(self.model)
        if self.pretrained and not own:
            given |= {"pretrained": True} if self.model.startswith("timm/") else {"weights": "DEFAULT"}
        if own and self.num_classes is None and ("num_classes" in given or not takes(self.model, "num_classes")):
            num_classes = 0  # the class decides for itself
        classes = self.num_classes or num_classes or None
        if not own and "num_classes" in given:
            classes = given.pop("num_classes")
        return create(self.model, num_classes=classes, in_channels=self.in_channels, **given)

    def _imported(self, path: str) -> nn.Module:
        from fxprune.onnx_import import import_onnx
        from fxprune.onnx_import.images import image_input

        given = {
            name: value
            for name in ("weights", "pretrained", "num_classes", "in_channels", "model_args")
            if (value := getattr(self, name))
        }
        if given:
            raise ModelError(f"{path} is a whole model with its weights; leave {', '.join(given)} out")
        image_input(path)
        return import_onnx(path)

    def trained_model(self, num_classes: int) -> nn.Module:
        """Build the model with its weights, in eval mode.

        Raises:
            ModelError: the task names neither weights nor `pretrained`.
            CheckpointError: the weights do not fit.
        """
        from fxprune.experiments.checkpoints import load_weights
        from fxprune.models.user_code import is_own

        if self.model is not None and is_file(self.model):
            return self.new_model(0)
        if self.weights is None and not self.pretrained and self.model is not None:
            otherwise = (
                f"say --pretrained where {self.model} brings its weights itself"
                if is_own(self.model)
                else "take the published ones (--pretrained), where torchvision or timm have the model"
            )
            raise ModelError(f"{self.model} has no weights: name a file (--weights), or {otherwise}")
        if self.weights is not None and self.pretrained:
            raise ModelError(f"{self.model}: weights ({self.weights}) and pretrained exclude each other")
        model = self.new_model(num_classes)
        if self.weights is not None:
            load_weights(model, self.weights)
        return model.eval()


def is_file(name: str) -> bool:
    """Whether a model's name is the path of an ONNX file."""
    return Path(name).suffix == ".onnx"


def task_from(config: Mapping[str, Any]) -> Task:
    """The task that a command's options describe, such as those in a run folder; its other options are left aside."""
    found = {field.name: config[field.name] for field in dataclasses.fields(Task) if field.name in config}
    found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return Task(**found)


def module_classes(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes of a model's modules: what its saved graph may name beside torch's own (see `fxprune.save`)."""
    return tuple({type(module) for module in model.modules()})


def scoring_loader(
    splits: DataSplits, *, images: int | None = None, batch_size: int = 256, unsplit: Dataset[Any] | None = None
) -> DataLoader[Any]:
    """Batches of the test split, of its first `images` where given.

    Args:
        splits: of the data set.
        images: at most so many.
        batch_size: images a batch.
        unsplit: what to take where there is no test split: of its images 1,024 unless `images` says otherwise.

    Raises:
        DataError: there are no test images.
        OptionsError: `images` is below 1.
    """
    from torch.utils.data import Subset

    from fxprune.data import make_loader

    dataset = splits.test
    if dataset is None and unsplit is not None:
        dataset, images = unsplit, SCORED if images is None else images
    if dataset is None:
        raise DataError(f"{splits.info.name} has no test images to score on")
    if images is None:
        return make_loader(dataset, batch_size=batch_size)
    if images < 1:
        raise OptionsError(f"test_images is {images}; it must be at least 1")
    count = min(images, len(dataset))  # type: ignore[arg-type]
    return make_loader(Subset(dataset, range(count)), batch_size=batch_size)


def number_of_images(loader: DataLoader[Any]) -> int:
    """How many images a loader of `make_loader` gives."""
    if loader.batch_size is not None:
        return len(loader.dataset)  # type: ignore[arg-type]
    return sum(len(batch) for batch in loader.sampler)


def import_user_code(names: Sequence[str]) -> None:
    """Import modules or files that register models of the user's own (or solvers).

    Args:
        names: module names, or paths that end in .py.

    Raises:
        ModelError: one cannot be imported.
    """
    from fxprune.models import user_code

    for name in names:
        user_code.import_user_code(name)
