"""Widths for a wanted speed-up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.channels.layout import Channels
from fxprune.channels.remove import remove_channels
from fxprune.errors import OptionsError
from fxprune.graph import Shape
from fxprune.speedup import Measure, beside_dense, search, write_onnx
from fxprune.widths.network import LayerSize, Width
from fxprune.widths.plan import Curve, least_macs, within_budget

TRIALS = 6


def counts_for_speedup(
    curves: Sequence[Curve], layers: Sequence[LayerSize], factor: float, speed: Callable[[Sequence[int]], float]
) -> tuple[list[int], float]:
    """The counts with the most MACs found that run `factor` times faster than dense, by bisection over budgets of MACs.

    Args:
        curves: of the widths.
        layers: what their MACs are.
        factor: wanted.
        speed: measures the speed-up of so many units left of each width.

    Returns:
        How many units are left of each width, and the speed-up that was measured.

    Raises:
        OptionsError: not reached even with the fewest channels.
    """
    whole, least = (
        sum(layer.macs([curve.choices[0] for curve in curves]) for layer in layers),
        least_macs(curves, layers),
    )
    counts, reached = search(
        least,
        whole,
        factor,
        lambda budget: within_budget(curves, layers, budget),
        speed,
        fewest=lambda: [curve.choices[-1] for curve in curves],
        trials=TRIALS,
    )
    if reached < factor:
        raise OptionsError(
            f"a speed-up of {factor:g} is out of reach: it was {reached:.2f} with as few channels as there may be, "
            f"{least / 1e6:.1f} M of {whole / 1e6:.1f} M MACs"
        )
    return counts, reached


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
