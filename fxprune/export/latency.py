"""How long a file takes in onnxruntime on the CPU, several files measured side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from torch import Tensor

from fxprune.errors import ValidationError
from fxprune.export.onnx_file import read_onnx


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: median, lower and upper quartile, and how many runs they are taken from."""

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.low:.2f} to {self.high:.2f})"


def measure_latency(
    paths: Sequence[str | Path], inputs: Sequence[Tensor], *, threads: int = 1, runs: int = 30, warmup: int = 3
) -> list[Latency]:
    """Time files on the same inputs, in turns, so that a busy moment of the machine hits all of them alike.

    Args:
        paths: ONNX files that take these inputs, in this order.
        inputs: one tensor for each input.
        threads: onnxruntime's threads for one operation.
        runs: timed runs of each file, at least 2.
        warmup: runs of each file before that.

    Raises:
        ValidationError: onnxruntime does not accept a file, or not these inputs.
    """
    import onnxruntime  # takes long to load

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    sessions, feeds = [], []
    for path in paths:
        file = read_onnx(path)
        arrays = [x.detach().cpu().numpy() for x in inputs]
        feeds.append({port.name: array for port, array in zip(file.inputs, arrays, strict=True)})
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for _ in range(max(1, warmup)):
                session.run(None, feeds[-1])
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise ValidationError(f"onnxruntime cannot run {path}: {error}") from error
        sessions.append(session)
    times: list[list[float]] = [[] for _ in paths]
    for run in range(runs):
        turn = range(len(sessions)) if run % 2 == 0 else reversed(range(len(sessions)))
        for i in turn:
            started = time.perf_counter()
            sessions[i].run(None, feeds[i])
            times[i].append(1e3 * (time.perf_counter() - started))
    return [
        Latency(median=quarters[1], low=quarters[0], high=quarters[2], runs=runs) for quarters in map(_quarters, times)
    ]


def _quarters(times: list[float]) -> list[float]:
    return quantiles(times, n=4, method="inclusive")
