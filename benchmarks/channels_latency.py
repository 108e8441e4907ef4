"""Latency of torchvision's networks with fewer channels: one image of 224 x 224, one thread of onnxruntime, all files in turn.

    python -m benchmarks.channels_latency --models mobilenet_v2 --recipes "channels:0.7;channels:speedup=1.25"

The weights are random and the channels chosen by magnitude: sizes decide about speed, and which channels go does not. What each
kind of layer takes comes from onnxruntime's own profiler.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import onnxruntime
import torch
import torchvision
import typer
from torch import Tensor

import fxprune
from fxprune import Options
from fxprune.export.latency import measure_latency

FILES = Path(tempfile.gettempdir())


def by_kind(path: Path, x: Tensor, runs: int) -> dict[str, float]:
    """Milliseconds that each kind of operation takes, depthwise convolutions apart: lower quartiles of its nodes, summed."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, {session.get_inputs()[0].name: x.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            if kind in ("Conv", "FusedConv"):
                _, size = (next(iter(shape.values())) for shape in event["args"]["input_type_shape"][:2])
                kind += ", depthwise" if size[1] == 1 else f" {size[2]} x {size[3]}"
            times[kind, event["name"]].append(event["dur"] / 1e3)
    found: dict[str, float] = defaultdict(float)
    for (kind, _), of_node in times.items():
        found[kind] += quantiles(of_node, n=4)[0]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main(
    models: str = "mobilenet_v2",
    recipes: Annotated[str, typer.Option(help="separated by semicolons")] = "channels:0.7;channels:speedup=1.25",
    multiple: int = 8,
    runs: int = 40,
    files: Annotated[Path, typer.Option(help="where the ONNX files are kept")] = FILES,
) -> None:
    """Print medians with their quartiles, and what each kind of operation takes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    for name in models.split(","):
        model = torchvision.models.get_model(name, weights=None).eval()
        paths, words = [], []
        for recipe in ("dense", *recipes.split(";")):
            found = fxprune.compile(
                model, [x], recipe, method="magnitude", options=Options(channel_multiple=multiple), progress=False
            )
            before, after = found.report.macs if recipe != "dense" else (1, 1)
            paths.append(files / f"{name}_{len(paths)}.onnx")
            words.append(f"{name} {recipe}: {after / before:.1%} of the MACs")
            fxprune.export_onnx(found, paths[-1], x)
        times = measure_latency(paths, [x], runs=runs)
        for path, word, time in zip(paths, words, times, strict=True):
            kinds = "; ".join(f"{kind} {ms:.2f}" for kind, ms in by_kind(path, x, runs // 2).items())
            print(f"{word}, {time}, {times[0].median / time.median:.2f}x, "
                  f"{times[0].low / time.low:.2f}x by lower quartiles\n    {kinds}", flush=True)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
