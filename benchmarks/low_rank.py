"""Low rank: output error of every layer, accuracy of trained networks, and latency in onnxruntime, dense against factored.

    python -m benchmarks.low_rank                                  everything (about half an hour on two cores)
    python -m benchmarks.low_rank --parts layers,networks,latency  some of it

Rows that the CSVs hold are not run again. The networks are the trained CIFAR ResNet-20 and -56 under `FXPRUNE_DATA` (else
../shared/data), and for latency only torchvision's ResNet-18 and -50 at 224 x 224 with random weights, whose ranks follow
from a budget and say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from benchmarks.low_rank_output import LAYERS, NETWORKS, write_page, write_plot
from benchmarks.machine import machine
from fxprune.annotations import annotation
from fxprune.calibration.observers import observer_of
from fxprune.data import load_npz, make_loader
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.csv_rows import append_rows, read_lines
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.export.latency import Latency, measure_latency
from fxprune.export.torch_export import to_onnx_program
from fxprune.layers.problem import layer_of, pose_problem
from fxprune.layers.splits import SPLITS, dense_macs, factored_macs, full_rank
from fxprune.models import create, model_info
from fxprune.passes import FoldBatchNorm, InsertObservers, RemoveInplace
from fxprune.rank_reduction import low_rank, low_rank_options
from fxprune.recipe import Recipe
from fxprune.solvers.low_rank import data_aware_factors, plain_factors
from fxprune.solvers.spatial_split import data_aware_spatial_factors, plain_spatial_factors
from fxprune.tracing import trace

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
CALIBRATION, AGREEMENT, BATCH = 1024, 3000, 128
SHARES = (0.3, 0.5, 0.7)  # of a layer's MACs, for the layer table
# (method, split, rank, multiple)
TRIALS = (
    ("data_aware", "auto", "macs:0.7", 4),
    ("svd", "auto", "macs:0.7", 4),
    ("data_aware", "channel", "macs:0.7", 4),
    ("data_aware", "auto", "macs:0.55", 4),
    ("data_aware", "auto", "macs:0.45", 4),
    ("data_aware", "auto", "macs:0.7", 16),
    ("data_aware", "auto", "macs:0.55", 16),
)
LARGE = ("resnet18", "resnet50")
LARGE_RANKS = ("macs:0.7", "macs:0.6", "macs:0.5")


@dataclass(frozen=True)
class LayerRow:
    """Held-out output error of one layer alone, relative to its output's variance, at one rank."""

    model: str
    layer: str
    split: str
    share: float
    rank: int
    error_svd: float
    error_data_aware: float


@dataclass(frozen=True)
class NetworkRow:
    """One factored network; times in ms are medians with quartiles."""

    model: str
    weights: str
    method: str
    split: str
    rank: str
    multiple: int
    macs_dense: int
    macs: int
    accuracy_dense: float | None
    accuracy: float | None
    agreement: float | None
    kl: float | None
    dense_ms: float
    dense_low: float
    dense_high: float
    ms: float
    low: float
    high: float
    speedup: float
    runs: int
    threads: int
    seconds: float
    machine: str


def trained(name: str, data: Path) -> nn.Module:
    """A CIFAR ResNet with its published weights."""
    return load_weights(create(name), data / "cifar10" / WEIGHTS[name]).eval()


def images(name: str, file: Path, split: str | None, first: int | None = None) -> Subset[object]:
    """Normalised images of one split, with labels."""
    info = model_info(name)
    dataset = load_npz(file, split, mean=info.mean, std=info.std, first=first)
    return Subset(dataset, range(len(dataset)))


def layer_rows(name: str, data: Path) -> list[LayerRow]:
    """Plain and data-aware factors of the same rank, every layer of a trained network by itself."""
    train = images(name, data / "cifar10" / "cifar10_subset.npz", "train", 2 * CALIBRATION)
    graph_module = trace(trained(name, data))
    RemoveInplace()(graph_module)
    FoldBatchNorm()(graph_module)
    InsertObservers(Recipe.parse("rank:0.7"))(graph_module)
    nodes = [n for n in graph_module.graph.nodes if annotation(n).role == "compress"]
    shapes: dict[nn.Module, torch.Size] = {}
    for node in nodes:
        layer_of(node).register_forward_hook(lambda module, args, _: shapes.__setitem__(module, args[0].shape))
    statistics = []
    for part in (range(CALIBRATION), range(CALIBRATION, 2 * CALIBRATION)):
        with torch.inference_mode():
            for batch, _ in make_loader(Subset(train, part), batch_size=BATCH):
                graph_module(batch)
        statistics.append([copy.copy(observer_of(node).statistics()) for node in nodes])
        for node in nodes:
            observer_of(node).reset()
    rows, options = [], low_rank_options(None, "data_aware")
    for node, inputs, held_out in zip(nodes, *statistics, strict=True):
        module, geometry = layer_of(node), annotation(node).geometry
        dense = geometry.to_matrix(module.weight.detach()).double()[0]
        problem = next(pose_problem(module, geometry, inputs, None, options).groups())
        metric, kernel = held_out.hessian(centred=True)[0], geometry.kernel_size
        variance = ((dense @ metric) * dense).sum()
        for split in SPLITS:
            whole, one = (
                dense_macs(geometry, shapes[module]),
                factored_macs(geometry, shapes[module], split, 1) if full_rank(geometry, split) else 0,
            )
            for share in SHARES if one else ():
                rank = min(full_rank(geometry, split), int(share * whole / one))
                if rank < 1:
                    continue
                if split == "channel":
                    pair = plain_factors(dense, rank), data_aware_factors(problem, rank)
                else:
                    pair = (
                        plain_spatial_factors(dense, kernel, rank),
                        data_aware_spatial_factors(problem, kernel, rank),
                    )
                lost = [dense - factors.product for factors in pair]
                errors = [float((((rest @ metric) * rest).sum() / variance).detach()) for rest in lost]
                rows.append(LayerRow(name, str(node.target), split, share, rank, *errors))
    return rows


def time_both(dense: nn.Module, small: nn.Module, image: Tensor, runs: int, threads: int) -> tuple[Latency, Latency]:
    """Both networks in onnxruntime, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in ("dense", "small")]
        for path, model in zip(paths, (dense, small), strict=True):
            program = to_onnx_program(model, (image,), opset=None, dynamic_batch=False, precision="fp32")
            program.save(str(path))
        first, second = measure_latency(paths, [image], runs=runs, threads=threads, warmup=10)
    return first, second


def network_row(
    name: str, data: Path | None, trial: tuple[str, str, str, int], runs: int, threads: int, cores: int
) -> NetworkRow:
    """Factor one network and measure it; `data` None: random weights, latency only."""
    method, split, rank, multiple = trial
    if data is None:
        torch.manual_seed(0)
        model, size = create(name).eval(), (1, *model_info(name).input_shape)
        batches: object = [torch.randn(size)]
    else:
        model, size = trained(name, data), (1, *model_info(name).input_shape)
        train = images(name, data / "cifar10" / "cifar10_subset.npz", "train", CALIBRATION)
        batches = make_loader(train, batch_size=BATCH)
    torch.set_num_threads(cores)
    small = low_rank(model, batches, rank, method=method, split=split, multiple=multiple, progress=False)
    scores: dict[str, float | None] = dict.fromkeys(("accuracy_dense", "accuracy", "agreement", "kl"))
    if data is not None:
        test = make_loader(images(name, data / "cifar10" / "cifar10_subset.npz", "test"), batch_size=BATCH)
        jpeg = make_loader(images(name, data / "cifar10" / "cifar10_jpeg_test.npz", None, AGREEMENT), batch_size=BATCH)
        top1, kl = agreement(model, small, jpeg)
        scores = {"accuracy_dense": evaluate(model, test), "accuracy": evaluate(small, test)}
        scores |= {"agreement": 100 * top1, "kl": kl}
    before, after = small.report.macs
    dense, fast = time_both(model, small, torch.randn(size), runs, threads)
    return NetworkRow(
        model=name,
        weights="random" if data is None else "trained",
        method=method,
        split=split,
        rank=rank,
        multiple=multiple,
        macs_dense=before,
        macs=after,
        **scores,
        dense_ms=dense.median,
        dense_low=dense.low,
        dense_high=dense.high,
        ms=fast.median,
        low=fast.low,
        high=fast.high,
        speedup=dense.median / fast.median,
        runs=runs,
        threads=threads,
        seconds=small.report.seconds,
        machine=machine(),
    )


def main() -> None:
    """Fill the two tables, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FXPRUNE_DATA", "../shared/data")))
    parser.add_argument("--parts", default="layers,networks,latency")
    parser.add_argument("--models", default="resnet20,resnet56", help="trained networks")
    parser.add_argument("--runs", type=int, default=100, help="timed runs of each network")
    parser.add_argument("--threads", type=int, default=1, help="onnxruntime's")
    parser.add_argument("--cores", type=int, default=torch.get_num_threads(), help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.cores)
    parts, models = args.parts.split(","), args.models.split(",")
    for name in models if "layers" in parts else ():
        if not any(row["model"] == name for row in read_lines(LAYERS)):
            append_rows(LAYERS, layer_rows(name, args.data), number=".6g")
    todo = [(name, args.data, trial) for name in models for trial in TRIALS] if "networks" in parts else []
    if "latency" in parts:
        todo += [(name, None, ("svd", "auto", rank, 16)) for name in LARGE for rank in LARGE_RANKS]
    for name, data, trial in todo:
        done = {(r["model"], r["method"], r["split"], r["rank"], int(r["multiple"])) for r in read_lines(NETWORKS)}
        if (name, *trial) not in done:
            row = network_row(name, data, trial, args.runs, args.threads, args.cores)
            append_rows(NETWORKS, [row], number=".6g")
            print(row, flush=True)
    write_plot(read_lines(NETWORKS), read_lines(LAYERS))
    write_page(read_lines(NETWORKS), read_lines(LAYERS))


if __name__ == "__main__":
    main()
