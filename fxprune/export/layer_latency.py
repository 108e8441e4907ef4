"""How long single layers take in onnxruntime on the CPU, at several numbers of channels."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fxprune.geometry import LayerGeometry

WARM_UP = 3


def measure_layer(
    geometry: LayerGeometry,
    shape: Sequence[int],
    channels: Sequence[tuple[int, int]],
    *,
    runs: int = 20,
    threads: int = 1,
) -> list[float]:
    """Microseconds of a layer's kernel at several numbers of channels, all in one file, one after the other in each run.

    The kernels are timed by onnxruntime's own profiler, in the memory layout that it picks for them: what it takes to bring
    values into this layout is left out, since between the layers of a network they stay in it.

    Args:
        geometry: of a layer.
        shape: of its input, (N, C, ...) or for a linear layer (N, ..., C); C is replaced.
        channels: of its input and output. A layer in groups gets as many groups as its output channels ask for.
        runs: timed; the mean of the middle half counts.
        threads: onnxruntime's threads.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, inputs, weights, outputs, feeds = [], {}, [], [], {}
    for number, (read, given) in enumerate(channels):
        one = _with_channels(geometry, read, given)
        size = (*shape[:-1], one.in_channels) if not one.kernel_size else (shape[0], one.in_channels, *shape[2:])
        size = size if one.kernel_size else (math.prod(size[:-1]), one.in_channels)
        source = f"x{one.in_channels}"
        inputs[source] = helper.make_tensor_value_info(source, TensorProto.FLOAT, size)
        feeds[source] = random.standard_normal(size, dtype=np.float32)
        values = random.standard_normal(_weight_shape(one), dtype=np.float32), np.zeros(given, np.float32)
        weights += [numpy_helper.from_array(v, f"{n}{number}") for n, v in zip(("w", "b"), values, strict=True)]
        operator, attributes = _operator(one)
        name = f"y{number}"
        nodes.append(helper.make_node(operator, [source, f"w{number}", f"b{number}"], [name], name=name, **attributes))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "layer", list(inputs.values()), outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        onnx.save(model, str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP + runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: list[list[float]] = [[] for _ in channels]
    for event in events:
        found = re.fullmatch(r"y(\d+)(_nchwc)?_kernel_time", event.get("name", ""))
        if found:
            times[int(found[1])].append(float(event["dur"]))
    return [_middle(of_one[WARM_UP:]) for of_one in times]


def _with_channels(geometry: LayerGeometry, read: int, given: int) -> LayerGeometry:
    if geometry.groups == 1:
        return replace(geometry, in_channels=read, out_channels=given)
    groups = max(1, given * geometry.groups // geometry.out_channels)
    return replace(
        geometry, in_channels=geometry.in_channels // geometry.groups * groups, out_channels=given, groups=groups
    )


def _weight_shape(geometry: LayerGeometry) -> tuple[int, ...]:
    first, second = geometry.out_channels, geometry.in_channels
    if geometry.transposed:
        first, second = second, first
    return first, second // geometry.groups, *geometry.kernel_size


def _operator(geometry: LayerGeometry) -> tuple[str, dict[str, Any]]:
    if not geometry.kernel_size:
        return "Gemm", {"transB": 1}
    attributes: dict[str, Any] = {
        "kernel_shape": geometry.kernel_size, "strides": geometry.stride, "dilations": geometry.dilation,
        "group": geometry.groups, "pads": [side for sides in zip(*geometry.padding, strict=True) for side in sides],
    }  # fmt: skip
    if geometry.transposed:
        return "ConvTranspose", {**attributes, "output_padding": geometry.output_padding}
    return "Conv", attributes


def _middle(times: Sequence[float]) -> float:
    """The mean of the middle half: the profiler counts whole microseconds, of which a small layer takes few."""
    ordered, quarter = sorted(times), len(times) // 4
    return fmean(ordered[quarter : len(ordered) - quarter])
