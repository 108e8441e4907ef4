"""The tables of `benchmarks.low_rank` on disk, and their picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fxprune.plots import save_figure
from fxprune.plots.style import FAINT, figure

HERE = Path(__file__).resolve().parent
NETWORKS, LAYERS, PICTURE = HERE / "low_rank.csv", HERE / "low_rank_layers.csv", HERE / "low_rank"
DATA_AWARE, PLAIN, CHANNEL = "#0072B2", "#7F7F7F", "#D55E00"

Table = list[dict[str, str]]


def read(path: Path) -> Table:
    """The rows of a table; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Any]) -> None:
    """Add rows, dataclasses all of one kind."""
    fresh = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def write_plot(networks: Table, layers: Table) -> None:
    """Three panels: layer errors, agreement against multiply-adds, latency."""
    with figure(4.8, 14) as picture:
        panels = picture.subplots(1, 3)
        _errors(panels[0], layers)
        _agreement(panels[1], [row for row in networks if row["weights"] == "trained" and row["multiple"] == "4"])
        _latency(panels[2], networks)
        save_figure(picture, PICTURE, formats=("png",))


def _errors(axes: Axes, layers: Table) -> None:
    """Every layer a dot: error of plain SVD against that of data-aware SVD, at the same rank."""
    for split, color, marker in (("channel", CHANNEL, "o"), ("spatial", DATA_AWARE, "s")):
        rows = [row for row in layers if row["split"] == split]
        x, y = ([100 * float(row[f"error_{method}"]) for row in rows] for method in ("svd", "data_aware"))
        axes.scatter(x, y, color=color, marker=marker, s=22, alpha=0.7, label=f"{split} split", linewidths=0)
    ends = [0.1, 100]
    axes.plot(ends, ends, color=FAINT, linewidth=1.4)
    axes.annotate("equal", (50, 50), xytext=(-4, 4), textcoords="offset points", ha="right", color=FAINT)
    axes.set(xscale="log", yscale="log", xlabel="plain SVD: % of the layer's output lost", ylabel="data-aware SVD")
    axes.set_title("One layer at a time, same rank")
    axes.legend(loc="lower right", frameon=False)


def _agreement(axes: Axes, rows: Table) -> None:
    """How close whole networks stay to dense at fewer multiply-adds."""
    kinds = (("data_aware", "auto", DATA_AWARE, "data-aware"), ("data_aware", "channel", CHANNEL, "channel split only"),
             ("svd", "auto", PLAIN, "plain SVD"))  # fmt: skip
    for model, style in (("resnet20", "--"), ("resnet56", "-")):
        for method, split, color, words in kinds:
            own = [r for r in rows if (r["model"], r["method"], r["split"]) == (model, method, split)]
            own.sort(key=lambda row: int(row["multiply_adds"]))
            fewer = [int(row["multiply_adds_dense"]) / int(row["multiply_adds"]) for row in own]
            label = f"{words}, ResNet-{model[6:]}" if own else None
            axes.plot(fewer, [float(row["agreement"]) for row in own], style, marker="o", color=color, label=label)
    axes.set(xlabel="times fewer multiply-adds", ylabel="% agreement with dense, top-1")
    axes.set_title("Trained CIFAR-10 networks")
    axes.legend(loc="lower left", frameon=False, fontsize=10)


def _latency(axes: Axes, networks: Table) -> None:
    """Median speed-up in onnxruntime, with the quartiles of the factored network's times."""
    rows = [row for row in networks if row["multiple"] == "16"]
    names = []
    for place, row in enumerate(reversed(rows)):
        dense, bar = float(row["dense_ms"]), FAINT if row["weights"] == "random" else DATA_AWARE
        axes.barh([place], [float(row["speedup"])], color=bar, height=0.65)
        ends = [dense / float(row["high"]), dense / float(row["low"])]
        axes.plot(ends, [place, place], color="black", linewidth=1.6)
        times = f"{float(row['ms']):.3g} ms for {dense:.3g}"
        axes.annotate(times, (0.05, place), va="center", color="white", weight="bold", size=10)
        fewer = int(row["multiply_adds_dense"]) / int(row["multiply_adds"])
        size = 224 if row["weights"] == "random" else 32
        names.append(f"ResNet-{row['model'][6:]}, {size}²\n{fewer:.2f}x fewer")
    axes.set_yticks(range(len(names)), names, size=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="times faster than dense in onnxruntime")
    axes.set_title("Latency, one image")
