"""How a compilation of ResNet-50 would grow with GPUs and images: a calculation, with its assumptions in one place.

    python -m benchmarks.growth

What one H100 takes is measured (benchmarks/speed_cuda.md); what several take is not: there was one GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torchvision

from fxprune.calibration.sampling import LEAST_PATCHES

MEASURED = 1024  # Images of 224 x 224, with:
STREAM, STATISTICS, SOLVE, OTHER = 4.9, 4.0, 8.6, 1.4  # s
SHARED_SOLVE = 0.5  # Of the solve: what goes by rows. Factorisations of D x D are done by every process.
BANDWIDTH = 20e9  # Bytes a second out of each GPU, between nodes.
EXCHANGES, LATENCY = (
    80,
    1e-4,
)  # A layer: sums, sizes, and what ADMM asks of the other rows; s for each and doubling of processes.
READ = 2400  # Images a second that 16 workers of one process decode, of a loader that gives each process its share.
PATCHES, ALONE = 64, 8  # For each column; where a layer sees one patch of an image.


@dataclass(frozen=True)
class Layer:
    """R rows, D columns, P positions of an image."""

    rows: int
    columns: int
    positions: int

    def patches(self, images: int, *, every: bool) -> float:
        """That its statistics are taken from."""
        there = images * self.positions
        wanted = max(PATCHES * self.columns, LEAST_PATCHES) if self.positions > 1 else ALONE * self.columns
        return there if every else min(there, wanted)


def resnet50() -> list[Layer]:
    """Its convolutions and its classifier."""
    model, found = torchvision.models.resnet50(weights=None).eval(), list[Layer]()

    def note(module: torch.nn.Module, _: object, y: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        found.append(Layer(len(weight), weight[0].numel(), math.prod(y.shape[2:])))

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return found


def seconds(layers: list[Layer], images: int, processes: int, *, every: bool) -> dict[str, float]:
    """By stage.

    Args:
        layers: of the model.
        images: in the set.
        processes: each with a GPU of its own.
        every: whether all patches are taken, rather than PATCHES for each column.
    """

    def products(count: int, *, every: bool) -> float:
        return sum(layer.patches(count, every=every) * layer.columns * (layer.columns + layer.rows) for layer in layers)

    needed = max(
        -(-max(PATCHES * x.columns, LEAST_PATCHES) // x.positions) if x.positions > 1 else ALONE * x.columns
        for x in layers
    )
    run = images if every else min(images, needed)
    bytes_summed = 8 * sum(
        2 * layer.columns * (layer.columns + layer.rows) for layer in layers
    )  # Of all, and of every fourth.
    return {
        "read": images / READ / processes,
        "stream": STREAM * run / MEASURED / processes,
        "statistics": STATISTICS * products(run, every=every) / products(MEASURED, every=False) / processes,
        "solve": SOLVE * (SHARED_SOLVE / processes + 1 - SHARED_SOLVE),
        "sums": 2 * (processes - 1) / processes * bytes_summed / BANDWIDTH,
        "waits": len(layers) * EXCHANGES * LATENCY * math.log2(processes),
        "other": OTHER,
    }


def main() -> None:
    """Print the table of docs/scale.md."""
    layers = resnet50()
    moments = sum(layer.columns**2 for layer in layers), sum(layer.rows * layer.columns for layer in layers)
    macs = sum(layer.rows * layer.columns * layer.positions for layer in layers)
    sums = f"sum D^2 {moments[0] / 1e6:.0f} M, sum R D {moments[1] / 1e6:.0f} M"
    print(f"ResNet-50: {len(layers)} layers, {macs / 1e9:.1f} G MACs an image, {sums}")
    names = list(seconds(layers, 1, 1, every=False))
    print(f"| images | patches | GPUs | {' | '.join(names)} | all, s | times faster |\n|{'---|' * (len(names) + 5)}")
    for images, every in ((1024, False), (16_384, False), (1_281_167, False), (1_281_167, True)):
        whole = sum(seconds(layers, images, 1, every=every).values())
        for processes in (1, 8, 64):
            of = seconds(layers, images, processes, every=every)
            total = sum(of.values())
            cells = " | ".join(f"{value:.1f}" for value in of.values())
            kind = "all" if every else f"{PATCHES} a column"
            print(f"| {images:,} | {kind} | {processes} | {cells} | {total:.0f} | {whole / total:.1f} |")


if __name__ == "__main__":
    main()
