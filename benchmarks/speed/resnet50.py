"""ResNet-50 with random weights, compiled 2:4 in a process of its own, so that its peak memory is its own.

python -m benchmarks.speed.resnet50 --images 128 --device cpu       prints one line of JSON
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks.speed.measure import Times, load, synchronise
from benchmarks.speed.rows import Row
from fxprune.models import create

BATCH_SIZE = 32
# What the process holds beside the calibration values: torch, the model, a layer's Hessian and workspace.
HEADROOM_GIB = 2


def run(images: int, size: int, device: str, threads: int, budget_gib: float, model: str, method: str) -> Row:
    """Compile in a new process and return its row."""
    began = load()
    command = [sys.executable, "-m", "benchmarks.speed.resnet50"]
    given: dict[str, Any] = {
        "images": images,
        "size": size,
        "device": device,
        "threads": threads,
        "budget-gib": budget_gib,
        "model": model,
        "method": method,
    }
    command += [f"--{name}={value}" for name, value in given.items()]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    seconds = result.pop("seconds")
    case = (
        f"{model}, {images} images {size}x{size}, 2:4, {'GPU' if device != 'cpu' else 'CPU'}, {budget_gib:g} GiB budget"
    )
    return Row.of("resnet50", case, method, Times((seconds,)), images=images, load=began, threads=threads, **result)


def measure(
    images: int, size: int, device: str, budget_gib: float, name: str, method: str, checkpoint_dir: str | None = None
) -> dict[str, Any]:
    """Compile here; seconds, their split, and peak memory in MiB."""
    torch.manual_seed(0)
    model = create(name)
    settle_batchnorm(model, size)
    model.to(device)
    limit = int(max(0.5, budget_gib - HEADROOM_GIB) * 2**30)
    batches: Any = random_batches(images, size, BATCH_SIZE)
    if torch.device(device).type == "cuda":
        torch.backends.cuda.preferred_linalg_library("default")
        batches = [x.pin_memory() for x in batches]  # Drawing random numbers is no part of it.
        model(batches[0][:2].to(device))  # Starts CUDA and its libraries.
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    started = time.perf_counter()
    where = {"memory_limit": limit, "checkpoint_dir": checkpoint_dir}
    report = fxprune.compile(model, batches, "2:4", method=method, device=device, progress=False, **where).report
    synchronise(device)
    seconds = time.perf_counter() - started
    stages = {stage: report.timings.get(stage, 0.0) for stage in ("stream", "statistics", "solve")}
    errors = [layer.relative_error for layer in report.layers if layer.status == "pruned" and layer.relative_error]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB.
    if torch.device(device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    return {
        "seconds": seconds,
        **stages,
        "other": seconds - sum(stages.values()),
        "error": sum(errors) / len(errors) if errors else None,
        "kl": report.kl,
        "agreement": None if report.agreement is None else 100 * report.agreement,
        "live_mib": report.peak_memory / 2**20,
        "rss_mib": peak,
    }


def settle_batchnorm(model: nn.Module, size: int) -> None:
    """Give BatchNorm the statistics of a few random images; with those of a new model, activations would explode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    model.eval()


def random_batches(images: int, size: int, batch_size: int) -> Iterator[Tensor]:
    """Random images, drawn as they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, images, batch_size):
        yield torch.randn(min(batch_size, images - start), 3, size, size, generator=generator)


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-gib", type=float, default=8.0)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--method", default="admm")
    parser.add_argument("--checkpoint-dir", help="folder of finished layers: a run that was stopped goes on from there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = (
        arguments.images,
        arguments.size,
        arguments.device,
        arguments.budget_gib,
        arguments.model,
        arguments.method,
        arguments.checkpoint_dir,
    )
    print(json.dumps(measure(*given)))


if __name__ == "__main__":
    main()
