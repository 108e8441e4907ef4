"""Two processes of one thread each against one process of one thread, side by side: time, and how far the results are apart.

    python -m benchmarks.distributed resnet20 resnet18 --rounds 2

A round is a compilation in one process and one in all of them, one after the other on the same machine. Two times are
given. Wall time is what a user waits for; it means something only where the machine has a core to spare for each process.
CPU seconds (of the process that takes most) leave out what other programs take, and the waiting for the other process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxprune
from benchmarks.machine import machine
from fxprune.models import create
from fxprune.runtime.processes import group_of_torchrun, world

DATA = Path(os.environ.get("FXPRUNE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resnet20(count: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """With the trained weights, on CIFAR-10 images."""
    model = create("resnet20")
    state = torch.load(DATA / "cifar10/resnet20-12fca82f.th", map_location="cpu", weights_only=False)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    images = np.load(DATA / "cifar10/cifar10_subset.npz")["train_images"][:count]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return model.eval(), ((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).split(128)


def resnet18(count: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """With random weights, on smooth random images of 224 x 224: the time depends on neither."""
    torch.manual_seed(0)
    model = create("resnet18").eval()
    coarse = torch.randn(count, 3, 14, 14)
    images = nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")
    return model, images.split(8)


MODELS = {"resnet20": (resnet20, 1024), "resnet18": (resnet18, 64)}


def compile_here(name: str, images: int, recipe: str, out: Path) -> None:
    """Compile in this process, with those that torchrun has started beside it, and write down what came of it."""
    torch.set_num_threads(1)
    model, batches = MODELS[name][0](images)
    with group_of_torchrun():
        started, used = time.perf_counter(), time.process_time()
        compiled = fxprune.compile(model, batches, recipe, progress=False)
        report = compiled.report
        found = {
            "wall": time.perf_counter() - started,
            "cpu": time.process_time() - used,
            "stages": {stage: round(seconds, 2) for stage, seconds in report.timings.items()},
            "errors": [layer.relative_error for layer in report.layers if layer.relative_error],
            "agreement": report.agreement,
            "kl": report.kl,
            "images": [report.images_read, report.images, report.images_held_out],
        }
        (out / f"{world().number}.json").write_text(json.dumps(found))


def run(name: str, images: int, recipe: str, processes: int) -> list[dict[str, Any]]:
    """What each of so many processes has found."""
    with tempfile.TemporaryDirectory() as folder:
        here = ["benchmarks.distributed", name, "--images", str(images), "--recipe", recipe, "--here", folder]
        start = [sys.executable, "-m", *here]
        if processes > 1:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            start = [*torchrun, "-m", *here]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run(start, check=True, env=environment, cwd=Path(__file__).resolve().parents[1])
        return [json.loads((Path(folder) / f"{number}.json").read_text()) for number in range(processes)]


def main() -> None:
    """Run the rounds, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, help="of the calibration set")
    parser.add_argument("--recipe", default="2:4")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here is not None:
        compile_here(given.models[0], given.images, given.recipe, given.here)
        return
    print(f"{machine()}; recipe {given.recipe}\n")
    print("| model | images | processes | wall, s | CPU, s | stages, s of wall time | error | agrees | KL |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in given.models:
        images = given.images or MODELS[name][1]
        ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
        for _ in range(given.rounds):
            one, several = run(name, images, given.recipe, 1), run(name, images, given.recipe, given.processes)
            for found in (one, several):
                of = found[0]
                wall, cpu = (max(process[key] for process in found) for key in ("wall", "cpu"))
                stages = ", ".join(f"{stage} {seconds}" for stage, seconds in of["stages"].items())
                error = statistics.mean(of["errors"])
                scores = " | ".join("" if of[key] is None else f"{of[key]:.4f}" for key in ("agreement", "kl"))
                print(
                    f"| {name} | {images} | {len(found)} | {wall:.1f} | {cpu:.1f} | {stages} | {error:.5f} | {scores} |",
                    flush=True,
                )
            for key, values in ratios.items():
                values.append(one[0][key] / max(process[key] for process in several))
        told = ", ".join(f"{key} {' '.join(f'{value:.2f}' for value in values)}" for key, values in ratios.items())
        print(f"| | | | | | **one process / several: {told}** | | | |", flush=True)


if __name__ == "__main__":
    main()
