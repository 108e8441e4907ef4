"""Per-layer statistics: ours against unfold + matmul, on ResNet-18's 3x3 stride-1 layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.speed.measure import interleaved, load, peak_extra_bytes, ratio
from benchmarks.speed.rows import Row
from benchmarks.speed.unfold import channels_innermost, unfold_gram, unfold_gram_lean
from fxprune.geometry import LayerGeometry
from fxprune.statistics.autocorrelation import applies, plan_for
from fxprune.statistics.patches import patch_gram
from fxprune.statistics.products import GramAccumulator, autocorrelation_pays

# (channels, side) of the inputs of ResNet-18's 3x3 stride-1 convolutions.
CIFAR = ((64, 32), (128, 16), (256, 8), (512, 4))
IMAGENET = ((64, 56), (128, 28), (256, 14), (512, 7))
OURS, UNFOLD, LEAN = "fxprune", "unfold + matmul", "unfold, no copy"


def run(
    sizes: dict[str, tuple[tuple[int, int], ...]],
    images: dict[str, int],
    *,
    repeats: int,
    batches: int = 4,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measure every layer of every data set.

    Args:
        sizes: (channels, side) of the layers, by data set.
        images: in a batch, by data set.
        repeats: rounds.
        batches: of that many images each, all the same one.
        device: where to compute.
        say: told each layer's outcome.
    """
    for data, layers in sizes.items():
        for channels, side in layers:
            rows = list(
                measure(f"{data} {channels}x{side}x{side}", channels, side, images[data], batches, repeats, device)
            )
            say(", ".join(f"{row.method}: {row.seconds:.3f} s, {row.extra_mib:.0f} MiB" for row in rows))
            yield from rows


def measure(
    case: str,
    channels: int,
    side: int,
    images: int,
    batches: int,
    repeats: int,
    device: str,
    section: str = "statistics",
) -> Iterator[Row]:
    """One layer: the time, the memory, the operations and the exactness of each way."""
    geometry = LayerGeometry(channels, channels, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    generator = torch.Generator().manual_seed(channels + side)
    x = torch.randn(images, channels, side, side, generator=generator).relu().to(device)

    def ours() -> Tensor:
        accumulator = GramAccumulator(geometry)
        for _ in range(batches):
            accumulator.add(x)
        return accumulator.total()[0]

    def unfolding(gram: Callable[[LayerGeometry, Tensor], Tensor]) -> Tensor:
        total = torch.zeros(geometry.columns, geometry.columns, dtype=torch.float64, device=device)
        for _ in range(batches):
            total += gram(geometry, x)
        return total

    ways: dict[str, Callable[[], Tensor]] = {
        OURS: ours,
        UNFOLD: lambda: unfolding(unfold_gram),
        LEAN: lambda: unfolding(unfold_gram_lean),
    }
    began = load()
    with torch.inference_mode():
        reference = torch.zeros(geometry.columns, geometry.columns, dtype=torch.float64, device=device)
        for part in x.split(max(1, images // 8)):
            reference += batches * patch_gram(geometry, part.double())[0]
        scale = reference.diagonal().clamp(min=1e-30).sqrt()
        extra, difference = {}, {}
        for name, way in ways.items():  # Serves as the warm-up too.
            extra[name], gram = peak_extra_bytes(way, device)
            gram = gram if name == OURS else channels_innermost(geometry, gram)
            difference[name] = float(((gram - reference).abs_() / scale[:, None] / scale).max())
        del reference, gram
        times = interleaved(ways, repeats, device=device, warm_up=False)
    for name in ways:
        flop, byte = counts(geometry, images, side, name)
        yield Row.of(
            section, case, name, times[name],
            over_first=ratio(times[name], times[OURS]).median, gflop=batches * flop / 1e9, gbyte=batches * byte / 1e9,
            result_mib=8 * geometry.columns**2 / 2**20, extra_mib=extra[name] / 2**20, difference=difference[name],
            images=batches * images, load=began, threads=torch.get_num_threads(),
        )  # fmt: skip


def counts(geometry: LayerGeometry, images: int, side: int, way: str) -> tuple[float, float]:
    """Floating-point operations, and float32 bytes read and written at the least, of one batch.

    Read and write: the layout, or the patch matrix and its copy, once each; then each product's two factors and its sum.
    """
    channels, columns = geometry.in_channels, geometry.columns
    values = images * channels * side**2
    padded = tuple(side + sum(p) for p in geometry.padding)
    positions = images * math.prod(geometry.output_size(padded))
    if way == OURS and applies(geometry) and autocorrelation_pays(geometry, side, side):
        plan = plan_for(geometry, side, side)
        moved = 2 * values + sum(2 * images * box.positions * channels + 2 * channels**2 for box in plan.blocks)
        return 2.0 * images * plan.positions * channels**2, 4.0 * moved
    patches = positions * columns
    copies = 3 if way == UNFOLD else 1
    return 2.0 * positions * columns**2, 4.0 * (values + copies * patches + patches + columns**2)
