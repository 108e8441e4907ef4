"""Whole compilations of CIFAR ResNets, side by side, and how they grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks import modelopt_sparsity
from benchmarks.speed import hook_sparsegpt
from benchmarks.speed.layer_statistics import measure
from benchmarks.speed.measure import Times, interleaved, load, ratio
from benchmarks.speed.rows import Row
from fxprune.data import load_npz
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.evaluation import agreement
from fxprune.models import create, model_info
from fxprune.report import PruneReport

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
DENSE, HOOKS, DEFAULT = "dense forward pass", "sparsegpt by hooks", "admm"
MODELOPT = "NVIDIA modelopt sparsegpt"
Say = Callable[[str], None]


def load_model(name: str, data_root: Path, images: int, batch_size: int = 128) -> tuple[nn.Module, list[Tensor], str]:
    """A model in eval mode, its calibration batches, and what they are in words.

    Trained weights and CIFAR-10 images where the data folder has them; random ones, seeded, otherwise.
    """
    torch.manual_seed(0)
    model = create(name).eval()
    weights = data_root / "cifar10" / WEIGHTS.get(name, "none")
    if weights.is_file():
        load_weights(model, weights)
    subset = data_root / "cifar10" / "cifar10_subset.npz"
    if subset.is_file():
        info = model_info(name)
        x = load_npz(subset, "train", mean=info.mean, std=info.std, first=images)[:images][0]
    else:
        x = torch.randn(images, 3, 32, 32)
    words = (
        f"{'trained' if weights.is_file() else 'random'} weights, {'CIFAR-10' if subset.is_file() else 'random'} images"
    )
    return model, list(x.split(batch_size)), words


def run(name: str, data_root: Path, images: int, *, repeats: int, exact_obs: bool = True, say: Say) -> Iterator[Row]:
    """The default method, SparseGPT and one dense pass, in turn, thrice the repeats; then what is slow, once."""
    model, batches, words = load_model(name, data_root, images)
    case = f"{name}, {images} images, 2:4 ({words})"
    reports: dict[str, list[PruneReport]] = {}
    others: dict[str, nn.Module] = {}

    def ours(method: str) -> Callable[[], None]:
        def compile_once() -> None:
            compiled = fxprune.compile(model, batches, "2:4", method=method, device="cpu", progress=False)
            reports.setdefault(method, []).append(compiled.report)

        return compile_once

    layers = pruned_layers(model, batches[0])
    computations: dict[str, Callable[[], Any]] = {
        DENSE: lambda: forward(model, batches),
        DEFAULT: ours(DEFAULT),
        "sparsegpt": ours("sparsegpt"),
    }
    began, rounds = load(), 3 * repeats  # They are short, and one slow moment of the machine would decide.
    times = interleaved(computations, rounds)
    for of_method in reports.values():
        del of_method[0]  # The warm-up's.
    slow: dict[str, Callable[[], Any]] = {
        HOOKS: lambda: others.__setitem__(HOOKS, hook_sparsegpt.prune(model, batches, layers))
    }
    if exact_obs:
        slow["exact_obs"] = ours("exact_obs")
    if modelopt_sparsity.is_installed():
        slow[MODELOPT] = lambda: others.__setitem__(MODELOPT, modelopt_sparsity.prune(model, batches))
    for method, computation in slow.items():
        say(f"{method}, once")
        times |= interleaved({method: computation}, 1, warm_up=False)
    for method, taken in times.items():
        values = split(reports[method], taken) if method in reports else {}
        if method in others:
            close = agreement(model, others[method], batches)
            values = {"kl": close.kl, "agreement": 100 * close.top1}
        over = ratio(taken, times[DENSE]).median if len(taken.seconds) == rounds else taken.median / times[DENSE].median
        yield Row.of(
            "compile", case, method, taken, over_first=over, images=images, load=began,
            threads=torch.get_num_threads(), **values,
        )  # fmt: skip
        say(f"{method}: {taken.median:.2f} s")
    if not modelopt_sparsity.is_installed():
        yield Row("compile", case, f"{MODELOPT} (not installed)", float("nan"), float("nan"), float("nan"), 0)


def forward(model: nn.Module, batches: list[Tensor]) -> None:
    """One dense forward pass over the calibration set."""
    with torch.inference_mode():
        for x in batches:
            model(x)


def pruned_layers(model: nn.Module, x: Tensor) -> list[str]:
    """The layers that fxprune prunes 2:4, in the order in which they run, found with a run on one batch."""
    compiled = fxprune.compile(model, [x], "2:4", method="magnitude", device="cpu", progress=False)
    return [layer.name for layer in compiled.report.layers if layer.status == "pruned"]


def split(reports: list[PruneReport], taken: Times) -> dict[str, Any]:
    """The stages' seconds, of the run whose time is the median, and what the layers lost."""
    middle = sorted(range(len(reports)), key=lambda i: taken.seconds[i])[(len(reports) - 1) // 2]
    report, seconds = reports[middle], taken.seconds[middle]
    stages = {stage: report.timings.get(stage, 0.0) for stage in ("stream", "statistics", "solve")}
    errors = [layer.relative_error for layer in report.layers if layer.status == "pruned" and layer.relative_error]
    return stages | {
        "other": seconds - sum(stages.values()),
        "error": sum(errors) / len(errors) if errors else None,
        "kl": report.kl,
        "agreement": None if report.agreement is None else 100 * report.agreement,
        "images_used": report.images,
        "live_mib": report.peak_memory / 2**20,
    }


def growth(data_root: Path, *, repeats: int, small: bool = False, say: Say) -> Iterator[Row]:
    """Time against calibration images, channels of a layer, and depth."""
    for images in (64, 128) if small else (128, 256, 512, 1024):
        model, batches, _ = load_model("resnet20", data_root, images)
        yield from _growth_rows("images", f"{images} images", model, batches, images, repeats, hooks=False)
        say(f"growth: {images} images")
    for channels in (16, 32) if small else (16, 32, 64, 128, 256):
        rows = measure(
            f"{channels} channels, 14x14", channels, 14, 8 if small else 32, 1, repeats, "cpu", "growth: channels"
        )
        yield from rows
        say(f"growth: {channels} channels")
    for depth in (20,) if small else (20, 32, 44, 56):
        images = 32 if small else 128
        model, batches, _ = load_model(f"resnet{depth}", data_root, images)
        yield from _growth_rows("depth", f"resnet{depth}", model, batches, images, repeats, hooks=True)
        say(f"growth: depth {depth}")


def _growth_rows(
    what: str, case: str, model: nn.Module, batches: list[Tensor], images: int, repeats: int, *, hooks: bool
) -> Iterator[Row]:
    reports: list[PruneReport] = []

    def default() -> None:
        compiled = fxprune.compile(model, batches, "2:4", device="cpu", progress=False)
        reports.append(compiled.report)

    def published() -> None:
        fxprune.compile(model, batches, "2:4", method="sparsegpt", device="cpu", progress=False)

    computations: dict[str, Callable[[], Any]] = {DENSE: lambda: forward(model, batches), DEFAULT: default}
    if hooks:
        layers = pruned_layers(model, batches[0])
        computations |= {"sparsegpt": published, HOOKS: lambda: hook_sparsegpt.prune(model, batches, layers)}
    began = load()
    times = interleaved(computations, repeats)
    del reports[0]
    for method, taken in times.items():
        yield Row.of(
            f"growth: {what}", case, method, taken, over_first=ratio(taken, times[DENSE]).median, images=images,
            load=began, threads=torch.get_num_threads(), **(split(reports, taken) if method == DEFAULT else {}),
        )  # fmt: skip
