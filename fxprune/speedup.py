"""A wanted speed-up: candidates are exported, and timed in onnxruntime beside the dense model; single layers are timed too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from torch import Tensor
from torch.fx import GraphModule

from fxprune.geometry import LayerGeometry

if TYPE_CHECKING:
    from fxprune.export.latency import Latency

LEAST_RUNS, MOST_RUNS, ENOUGH = 30, 300, 1000.0  # Runs of each file, until a second of them: quick networks need more.

Candidate = TypeVar("Candidate")
Measure: TypeAlias = "Callable[[Sequence[Path], Sequence[Tensor]], Sequence[Latency]]"
Write: TypeAlias = Callable[[Path], None]


def search(
    least: float,
    whole: float,
    factor: float,
    candidate: Callable[[float], Candidate],
    speed: Callable[[Candidate], float],
    *,
    fewest: Callable[[], Candidate],
    trials: int,
) -> tuple[Candidate, float]:
    """The candidate of the largest budget found that runs `factor` times faster than dense, by bisection over budgets.

    Args:
        least: MACs, or any other cost, that are left at least.
        whole: those of the dense model.
        factor: wanted.
        candidate: the best one for a budget.
        speed: measures the speed-up of a candidate.
        fewest: the candidate of the least cost, which is tried where no other is fast enough.
        trials: before that.

    Returns:
        The candidate and its speed-up, which falls short where even the least cost does not give it.
    """
    best: tuple[Candidate, float] | None = None
    low, high, budget = least, whole, max(least, 0.9 * whole / factor)
    for _ in range(trials):
        found = candidate(budget)
        reached = speed(found)
        if reached >= factor:
            best, low = (found, reached), budget
        else:
            high = budget
        budget = (low + high) / 2
    return best or (found := fewest(), speed(found))


@contextmanager
def beside_dense(
    write_dense: Write, inputs: Sequence[Tensor], measure: Measure | None = None
) -> Iterator[Callable[[Write], float]]:
    """Inside, the speed-up of what a function writes to a path: the ratio of the lower quartiles, dense / candidate.

    A busy machine makes runs slower, never faster. With two other programs on two cores, medians of 30 runs took a MobileNetV2
    for 1.25 times faster that was 1.12 times faster by the lower quartiles of 300, and 1.11 by their fastest twentieth.

    Args:
        write_dense: writes the dense model, once.
        inputs: the model's arguments for one image.
        measure: how to time files; None: `fxprune.export.latency.measure_latency`.
    """
    # The engine imports the export here only, where files are what is measured.
    from fxprune.export.latency import measure_latency

    inputs = [x.cpu() for x in inputs]
    with tempfile.TemporaryDirectory() as folder:
        dense, candidate = Path(folder) / "dense.onnx", Path(folder) / "candidate.onnx"
        write_dense(dense)
        if measure is None:
            (once,) = measure_latency([dense], inputs, runs=5)
            measure = partial(measure_latency, runs=round(min(MOST_RUNS, max(LEAST_RUNS, ENOUGH / once.low))))

        def speed(write: Write) -> float:
            write(candidate)
            slow, fast = measure([dense, candidate], inputs)
            return slow.low / fast.low

        yield speed


def layer_times(geometry: LayerGeometry, shape: Sequence[int], channels: Sequence[tuple[int, int]]) -> list[float]:
    """Microseconds of a layer in onnxruntime: `fxprune.export.layer_latency.measure_layer`."""
    from fxprune.export.layer_latency import measure_layer

    return measure_layer(geometry, shape, channels)


def write_onnx(graph_module: GraphModule, inputs: Sequence[Tensor], path: Path) -> None:
    """Write a graph on the CPU as a file to be timed, which nobody validates."""
    from fxprune.export.torch_export import to_onnx_program

    graph_module.recompile()
    images = tuple(x.cpu() for x in inputs)
    program = to_onnx_program(graph_module.eval(), images, opset=None, dynamic_batch=False, precision="fp32")
    program.save(str(path))
