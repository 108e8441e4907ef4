"""Widths for a wanted speed-up: candidates are exported, and timed in onnxruntime beside the dense model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from torch import Tensor
from torch.fx import GraphModule

from fxprune.channels.layout import Channels
from fxprune.channels.remove import remove_channels
from fxprune.errors import OptionsError
from fxprune.graph import Shape
from fxprune.widths.network import LayerSize, Width
from fxprune.widths.plan import Curve, least_macs, within_budget

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Node

    from fxprune.export.latency import Latency

TRIALS = 6
Measure: TypeAlias = "Callable[[Sequence[Path], Sequence[Tensor]], Sequence[Latency]]"


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
    whole = sum(layer.macs([curve.choices[0] for curve in curves]) for layer in layers)
    low, high = least_macs(curves, layers), whole
    best: tuple[list[int], float] | None = None
    budget = max(low, 0.9 * whole / factor)
    for _ in range(TRIALS):
        counts = within_budget(curves, layers, budget)
        reached = speed(counts)
        if reached >= factor:
            best, low = (counts, reached), budget
        else:
            high = budget
        budget = (low + high) / 2
    if best is None:
        counts = [curve.choices[-1] for curve in curves]
        best = counts, speed(counts)
    if best[1] < factor:
        raise OptionsError(
            f"a speed-up of {factor:g} is out of reach: it was {best[1]:.2f} with as few channels as there may be, "
            f"{low / 1e6:.1f} M of {whole / 1e6:.1f} M MACs"
        )
    return best


def measured_speed(
    graph_module: GraphModule,
    channels: Channels,
    shapes: Mapping[Node, Shape],
    widths: Sequence[Width],
    inputs: Sequence[Tensor],
    *,
    measure: Measure | None = None,
) -> Callable[[Sequence[int]], float]:
    """What measures the speed-up of so many units left of each width, the ratio of the medians.

    Only sizes matter to speed: which units go makes no difference.

    Args:
        graph_module: as it is.
        channels: its analysis.
        shapes: of every node's value.
        widths: of the graph.
        inputs: the model's arguments for one image.
        measure: how to time files; None: `fxprune.export.latency.measure_latency`.
    """
    # The engine imports the export here only, where files are what is measured.
    from fxprune.export.latency import measure_latency
    from fxprune.export.torch_export import to_onnx_program

    measure = measure or measure_latency
    inputs = [x.cpu() for x in inputs]

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
        candidate.recompile()
        program = to_onnx_program(candidate.eval(), tuple(inputs), opset=None, dynamic_batch=False, precision="fp32")
        program.save(str(path))

    def speed(counts: Sequence[int]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            dense, narrow = Path(folder) / "dense.onnx", Path(folder) / "narrow.onnx"
            write(dense, [len(width.units) for width in widths])
            write(narrow, counts)
            slow, fast = measure([dense, narrow], inputs)
        return slow.median / fast.median

    return speed
