"""Widths for a wanted speed-up: a table of layer times says what channels are worth, whole networks are timed against it.

Kernels work in blocks of channels, 16 where there is AVX-512, so that 24 channels take as long as 32: MACs do not know that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Size, Tensor
from torch.fx import GraphModule, Node

from fxprune.calibration.shapes import Example
from fxprune.channels.layout import Channels
from fxprune.channels.remove import remove_channels
from fxprune.errors import OptionsError
from fxprune.geometry import LayerGeometry
from fxprune.graph import Shape, input_of
from fxprune.layers.problem import layer_of
from fxprune.speedup import Measure, beside_dense, layer_times, search, write_onnx
from fxprune.widths.network import LayerSize, Times, Width
from fxprune.widths.plan import Curve, least_cost, within_budget

TRIALS = 6
POINTS = 16


def counts_for_speedup(
    curves: Sequence[Curve], layers: Sequence[LayerSize], factor: float, speed: Callable[[Sequence[int]], float]
) -> tuple[list[int], float]:
    """The counts of the largest budget found that run `factor` times faster than dense, by bisection.

    Args:
        curves: of the widths.
        layers: what they cost.
        factor: wanted.
        speed: measures the speed-up of so many units left of each width.

    Returns:
        How many units are left of each width, and the speed-up that was measured.

    Raises:
        OptionsError: not reached even with the fewest channels.
    """
    most, fewest = [curve.choices[0] for curve in curves], [curve.choices[-1] for curve in curves]
    counts, reached = search(
        least_cost(curves, layers),
        sum(layer.cost(most) for layer in layers),
        factor,
        lambda budget: within_budget(curves, layers, budget),
        speed,
        fewest=lambda: fewest,
        trials=TRIALS,
    )
    if reached < factor:
        least, whole = (sum(layer.macs(counts) for layer in layers) for counts in (fewest, most))
        raise OptionsError(
            f"a speed-up of {factor:g} is out of reach: it was {reached:.2f} with as few channels as there may be, "
            f"{least / 1e6:.1f} M of {whole / 1e6:.1f} M MACs"
        )
    return counts, reached


def with_times(sizes: Mapping[Node, LayerSize], curves: Sequence[Curve], example: Example) -> list[LayerSize]:
    """Layers with the time that each takes, for one image, by the channels of its input and by those of its output.

    Args:
        sizes: of layers.
        curves: of the widths; at most POINTS of the choices are measured for each side of a layer.
        example: of the graph.
    """
    known: dict[object, list[float]] = {}
    found = []
    for node, size in sizes.items():
        geometry, source = LayerGeometry.of(layer_of(node)), example.shapes[input_of(node)]
        assert isinstance(source, Size)
        shape = (1, *source[1:])
        read, given = (
            _points(*side, curves) for side in ((size.inputs, size.fixed_inputs), (size.outputs, size.fixed_outputs))
        )
        whole = geometry.in_channels, geometry.out_channels
        channels = (whole, *((n, whole[1]) for n in read), *((whole[0], n) for n in given))
        if (key := (geometry, shape, channels)) not in known:  # Blocks of one stage are alike.
            known[key] = layer_times(geometry, shape, channels)
        first, *times = known[key]
        of_read, of_given = zip(read, times, strict=False), zip(given, times[len(read) :], strict=True)
        found.append(replace(size, times=Times(first, tuple(of_read), tuple(of_given))))
    return found


def _points(units: Mapping[int, int], fixed: int, curves: Sequence[Curve]) -> list[int]:
    """Numbers of channels of one side of a layer, ascending, from the fewest to all; none if no width is part of it."""
    if not units:
        return []
    shares = np.linspace(0, 1, POINTS)

    def left(width: int, share: float) -> int:
        choices = curves[width].choices
        return choices[round(share * (len(choices) - 1))]

    return sorted({fixed + sum(size * left(w, share) for w, size in units.items()) for share in shares})


@contextmanager
def measured_speed(
    graph_module: GraphModule,
    channels: Channels,
    shapes: Mapping[Node, Shape],
    widths: Sequence[Width],
    inputs: Sequence[Tensor],
    *,
    measure: Measure | None = None,
) -> Iterator[Callable[[Sequence[int]], float]]:
    """Inside, what measures the speed-up of so many units left of each width.

    Only sizes matter to speed: which units go makes no difference.

    Args:
        graph_module: as it is.
        channels: its analysis.
        shapes: of every node's value.
        widths: of the graph.
        inputs: the model's arguments for one image.
        measure: how to time files; None: `fxprune.export.latency.measure_latency`.
    """

    def write(path: Path, counts: Sequence[int]) -> None:
        candidate = copy.deepcopy(graph_module).cpu()
        twins = dict(zip(graph_module.graph.nodes, candidate.graph.nodes, strict=True))
        gone = [
            c
            for width, count in zip(widths, counts, strict=True)
            for unit in width.units[count:]
            for c in channels.units[unit].tolist()
        ]
        of_candidate = replace(channels, layouts={twins[node]: layout for node, layout in channels.layouts.items()})
        remove_channels(
            candidate, of_candidate, np.array(gone, dtype=np.int64), {twins[n]: shape for n, shape in shapes.items()}
        )
        write_onnx(candidate, inputs, path)

    with beside_dense(lambda path: write(path, [len(width.units) for width in widths]), inputs, measure) as speed:
        yield lambda counts: speed(lambda path: write(path, counts))
